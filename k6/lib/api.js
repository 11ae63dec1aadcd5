// What every script shares: where the service is, how a request is sent and checked, and people
// to send it for.
//
// BASE_URL  where the service listens (http://127.0.0.1:8000)
// USERS     how many people set-up registers; each costs the service one bcrypt hash

import http from 'k6/http';
import { check } from 'k6';

export const BASE_URL = __ENV.BASE_URL || 'http://127.0.0.1:8000';
export const PASSWORD = 'mossy-Lantern-42-harbour';

// One request under the name of its endpoint, checked to answer with this status.
export function call(name, method, path, { token, body, status = 200, headers = {} } = {}) {
  const params = { tags: { name }, headers: { 'Content-Type': 'application/json', ...headers } };
  if (token) params.headers.Authorization = `Bearer ${token}`;
  const expected = [].concat(status);
  params.responseCallback = http.expectedStatuses(...expected);
  const answer = http.request(method, BASE_URL + path, body && JSON.stringify(body), params);
  check(answer, { [`${name}: ${expected.join(' or ')}`]: (r) => expected.includes(r.status) }, { name });
  return answer;
}

export function signIn(email) {
  const body = { email, password: PASSWORD };
  return call('sign in', 'POST', '/api/v1/auth/login', { body });
}

// Registers `count` people, for a script's set-up.
export function people(count) {
  const run = `${Date.now()}-${Math.floor(Math.random() * 1e6)}`;
  return Array.from({ length: count }, (_, n) => {
    const email = `k6-${run}-${n}@example.com`;
    const body = { email, password: PASSWORD };
    const answer = call('register', 'POST', '/api/v1/auth/register', { body, status: 201 });
    if (answer.status !== 201) throw new Error(`cannot register: ${answer.status} ${answer.body}`);
    return personOf(answer);
  });
}

export function personOf(answer) {
  const { user, access_token, refresh_token } = answer.json();
  return { email: user.email, token: access_token, refreshToken: refresh_token, tasks: `/api/v1/${user.id}/tasks` };
}

// The one of `all` that this virtual user plays.
export function mine(all) {
  return all[__VU % all.length];
}

// The thresholds of normal load for each of these endpoints: 95 % of the answers within `p95`
// milliseconds (SC-003), fewer than 0.1 % of them failures, more than 99.9 % of all checks kept.
export function thresholds(names, p95 = 1000) {
  const all = { checks: ['rate>0.999'] };
  for (const name of names) {
    all[`http_req_duration{name:${name}}`] = [`p(95)<${p95}`];
    all[`http_req_failed{name:${name}}`] = ['rate<0.001'];
  }
  return all;
}

export const trendStats = ['min', 'med', 'avg', 'p(95)', 'p(99)', 'max'];
