// One walk through every route, each answer as it should be. Seconds; the first thing to run.
//
//   k6 run k6/smoke.js

import { check } from 'k6';
import { call, PASSWORD, people, personOf, signIn, trendStats } from './lib/api.js';

export const options = {
  vus: 1,
  iterations: 1,
  thresholds: { checks: ['rate==1'], http_req_failed: ['rate==0'] },
  summaryTrendStats: trendStats,
};

export default function () {
  call('healthz', 'GET', '/healthz');
  call('readyz', 'GET', '/readyz');
  call('openapi', 'GET', '/openapi.json');
  call('docs', 'GET', '/docs');
  call('problem page', 'GET', '/problems/validation_failed');

  const [{ email, tasks, token }] = people(1);
  call('me', 'GET', '/api/v1/auth/me', { token });

  const milk = { title: 'Buy milk', description: 'Two litres' };
  const headers = { 'Idempotency-Key': `smoke-${Date.now()}` };
  const created = call('create', 'POST', tasks, { token, body: milk, status: 201, headers });
  const path = created.headers.Location;
  const again = call('create again', 'POST', tasks, { token, body: milk, status: 201, headers });
  check(again, { 'a retry makes no second task': (r) => r.json('id') === created.json('id') });

  const etag = call('read', 'GET', path, { token }).headers.Etag;
  call('read unchanged', 'GET', path, { token, status: 304, headers: { 'If-None-Match': etag } });
  const put = { token, body: { title: 'Buy oat milk' }, headers: { 'If-Match': etag } };
  call('edit', 'PUT', path, put);
  call('edit what moved on', 'PUT', path, { ...put, status: 412 });
  call('edit a part', 'PATCH', path, { token, body: { description: null } });
  const done = call('toggle', 'PATCH', `${path}/complete`, { token });
  check(done, { 'a toggled task is done': (r) => r.json('completed') === true });

  const peas = call('create', 'POST', tasks, { token, body: { title: 'Sow peas' }, status: 201 });
  const page = call('list', 'GET', `${tasks}?limit=1&total=true`, { token });
  check(page, {
    'the newest comes first': (r) => r.json('0.title') === 'Sow peas',
    'there are two': (r) => r.headers['X-Total-Count'] === '2',
    'the list goes on': (r) => r.headers.Link.includes('rel="next"'),
  });
  const found = call('search', 'GET', `${tasks}?q=OAT&completed=true`, { token });
  check(found, { 'the search finds it': (r) => r.json('0.title') === 'Buy oat milk' });
  const cleared = call('clear completed', 'DELETE', `${tasks}?completed=true`, { token });
  check(cleared, { 'one was completed': (r) => r.json('deleted') === 1 });
  call('read what is gone', 'GET', path, { token, status: 404 });
  call('delete', 'DELETE', peas.headers.Location, { token, status: 204 });

  call('refused without a token', 'GET', tasks, { status: 401 });
  call('refused to others', 'GET', '/api/v1/somebody/tasks', { token, status: 403 });
  call('refused as invalid', 'POST', tasks, { token, body: {}, status: 422 });

  const second = personOf(signIn(email));
  const sessions = call('sessions', 'GET', '/api/v1/auth/sessions', { token }).json();
  const other = sessions.find((session) => !session.current);
  call('end a session', 'DELETE', `/api/v1/auth/sessions/${other.id}`, { token, status: 204 });
  call('refused after its end', 'POST', '/api/v1/auth/refresh', {
    body: { refresh_token: second.refreshToken }, status: 401,
  });
  const third = personOf(signIn(email));
  const fourth = personOf(call('refresh', 'POST', '/api/v1/auth/refresh', {
    body: { refresh_token: third.refreshToken },
  }));
  call('end the others', 'DELETE', '/api/v1/auth/sessions', { token: fourth.token, status: 204 });
  const passwords = { current_password: PASSWORD, new_password: `another-${PASSWORD}` };
  const changed = personOf(call('change the password', 'PUT', '/api/v1/auth/password', {
    token: fourth.token, body: passwords,
  }));
  call('refused after the change', 'GET', '/api/v1/auth/me', { token: fourth.token, status: 401 });
  const fifth = personOf(call('sign in anew', 'POST', '/api/v1/auth/login', {
    body: { email, password: passwords.new_password },
  }));
  call('sign out', 'POST', '/api/v1/auth/logout', { token: changed.token, status: 204 });
  call('delete the account', 'DELETE', '/api/v1/auth/me', {
    token: fifth.token, body: { password: passwords.new_password }, status: 204,
  });
  call('refused after the account', 'POST', '/api/v1/auth/login', {
    body: { email, password: passwords.new_password }, status: 401,
  });
}
