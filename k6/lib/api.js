// Shared by all scripts: the address of the service, checked requests, users, and thresholds.
//
// BASE_URL  the service (http://127.0.0.1:8000)
// USERS     number of users that the setup registers; each costs the service one bcrypt hash

import http from 'k6/http';
import { check } from 'k6';

export const BASE_URL = __ENV.BASE_URL || 'http://127.0.0.1:8000';
export const PASSWORD = 'mossy-Lantern-42-harbour';

// Sends one request, tagged with the name of its endpoint, and checks the status.
export function request(name, method, path, { token, body, status = 200, headers = {} } = {}) {
  const params = { tags: { name }, headers: { 'Content-Type': 'application/json', ...headers } };
  if (token) params.headers.Authorization = `Bearer ${token}`;
  const expected = [].concat(status);
  params.responseCallback = http.expectedStatuses(...expected);
  const response = http.request(method, BASE_URL + path, body && JSON.stringify(body), params);
  check(response, { [`${name}: ${expected.join(' or ')}`]: (r) => expected.includes(r.status) }, { name });
  return response;
}

export function logIn(email) {
  const body = { email, password: PASSWORD };
  return request('login', 'POST', '/api/v1/auth/login', { body });
}

// Registers `count` users, for the setup of a script.
export function registerUsers(count) {
  const run = `${Date.now()}-${Math.floor(Math.random() * 1e6)}`;
  return Array.from({ length: count }, (_, n) => {
    const email = `k6-${run}-${n}@example.com`;
    const body = { email, password: PASSWORD };
    const response = request('register', 'POST', '/api/v1/auth/register', { body, status: 201 });
    if (response.status !== 201) throw new Error(`cannot register: ${response.status} ${response.body}`);
    return toUser(response);
  });
}

export function toUser(response) {
  const { user, access_token, refresh_token } = response.json();
  return { email: user.email, token: access_token, refreshToken: refresh_token, tasks: `/api/v1/${user.id}/tasks` };
}

// Returns the user as which this virtual user sends requests.
export function ownUser(all) {
  return all[__VU % all.length];
}

// The thresholds of normal load for these endpoints: 95 % of the responses within `p95`
// milliseconds (SC-003), fewer than 0.1 % failures, and more than 99.9 % of all checks passed.
export function thresholds(names, p95 = 1000) {
  const all = { checks: ['rate>0.999'] };
  for (const name of names) {
    all[`http_req_duration{name:${name}}`] = [`p(95)<${p95}`];
    all[`http_req_failed{name:${name}}`] = ['rate<0.001'];
  }
  return all;
}

export const trendStats = ['min', 'med', 'avg', 'p(95)', 'p(99)', 'max'];
