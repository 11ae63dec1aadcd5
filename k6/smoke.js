// Sends one request to every route and checks each response. Takes seconds.
//
//   k6 run k6/smoke.js

import { check } from 'k6';
import { request, PASSWORD, registerUsers, toUser, logIn, trendStats } from './lib/api.js';

export const options = {
  vus: 1,
  iterations: 1,
  thresholds: { checks: ['rate==1'], http_req_failed: ['rate==0'] },
  summaryTrendStats: trendStats,
};

export default function () {
  request('healthz', 'GET', '/healthz');
  request('readyz', 'GET', '/readyz');
  request('openapi', 'GET', '/openapi.json');
  request('docs', 'GET', '/docs');
  // 404 without a mail server.
  request('reset page', 'GET', '/account/reset', { status: [200, 404] });
  request('verify page', 'GET', '/account/verify', { status: [200, 404] });
  request('problem page', 'GET', '/problems/validation_failed');

  const [{ email, tasks, token }] = registerUsers(1);
  request('me', 'GET', '/api/v1/auth/me', { token });

  const milk = { title: 'Buy milk', description: 'Two litres' };
  const headers = { 'Idempotency-Key': `smoke-${Date.now()}` };
  const created = request('create', 'POST', tasks, { token, body: milk, status: 201, headers });
  const path = created.headers.Location;
  const again = request('create again', 'POST', tasks, { token, body: milk, status: 201, headers });
  check(again, { 'a retry creates no second task': (r) => r.json('id') === created.json('id') });

  const etag = request('read', 'GET', path, { token }).headers.Etag;
  request('read unchanged', 'GET', path, { token, status: 304, headers: { 'If-None-Match': etag } });
  const put = { token, body: { title: 'Buy oat milk' }, headers: { 'If-Match': etag } };
  request('edit', 'PUT', path, put);
  request('edit an old version', 'PUT', path, { ...put, status: 412 });
  request('edit a part', 'PATCH', path, { token, body: { description: null } });
  const done = request('toggle', 'PATCH', `${path}/complete`, { token });
  check(done, { 'the toggled task is completed': (r) => r.json('completed') === true });

  const peas = request('create', 'POST', tasks, { token, body: { title: 'Sow peas' }, status: 201 });
  const page = request('list', 'GET', `${tasks}?limit=1&total=true`, { token });
  check(page, {
    'the newest task is first': (r) => r.json('0.title') === 'Sow peas',
    'the total is two': (r) => r.headers['X-Total-Count'] === '2',
    'there is a next page': (r) => r.headers.Link.includes('rel="next"'),
  });
  const unchanged = { token, status: 304, headers: { 'If-None-Match': page.headers.Etag } };
  request('list unchanged', 'GET', tasks, unchanged);
  const changes = tasks.replace('/tasks', '/changes');
  const first = request('changes', 'GET', changes, { token });
  check(first, { 'there are two tasks': (r) => r.json('tasks').length === 2 && !r.json('more') });
  const found = request('search', 'GET', `${tasks}?q=OAT&completed=true`, { token });
  check(found, { 'the search finds the task': (r) => r.json('0.title') === 'Buy oat milk' });
  const cleared = request('clear completed', 'DELETE', `${tasks}?completed=true`, { token });
  check(cleared, { 'one completed task was deleted': (r) => r.json('deleted') === 1 });
  request('read a deleted task', 'GET', path, { token, status: 404 });
  request('delete', 'DELETE', peas.headers.Location, { token, status: 204 });
  const rest = request('changes since', 'GET', `${changes}?since=${first.json('cursor')}`, { token });
  check(rest, { 'two tasks were deleted': (r) => r.json('tasks').length === 0 && r.json('deleted').length === 2 });
  const id = `${Date.now().toString(16).padStart(12, '0').replace(/^(.{8})/, '$1-')}-7000-8000-000000000001`;
  const create = { token, body: milk, headers: { 'If-None-Match': '*' } };
  request('create with an own id', 'PUT', `${tasks}/${id}`, { ...create, status: 201 });
  request('create with an own id again', 'PUT', `${tasks}/${id}`, { ...create, status: 412 });

  request('refused without a token', 'GET', tasks, { status: 401 });
  request('refused for another user', 'GET', '/api/v1/another-user/tasks', { token, status: 403 });
  request('refused as invalid', 'POST', tasks, { token, body: {}, status: 422 });

  // Without a mail server these routes are 404; the token is invalid in any case.
  const newPassword = `another-${PASSWORD}`;
  request('forgotten password', 'POST', '/api/v1/auth/password/forgot', { body: { email }, status: [202, 404] });
  request('resend', 'POST', '/api/v1/auth/email/resend', { body: { email }, status: [202, 404] });
  request('refused reset', 'POST', '/api/v1/auth/password/reset', {
    body: { token: 'none', new_password: newPassword }, status: [401, 404],
  });
  request('refused verification', 'POST', '/api/v1/auth/email/verify', { body: { token: 'none' }, status: [401, 404] });
  request('change of address', 'PUT', '/api/v1/auth/email', {
    token, body: { email: `new-${email}`, password: PASSWORD }, status: [202, 404],
  });

  const second = toUser(logIn(email));
  const sessions = request('sessions', 'GET', '/api/v1/auth/sessions', { token }).json();
  const other = sessions.find((session) => !session.current);
  request('end a session', 'DELETE', `/api/v1/auth/sessions/${other.id}`, { token, status: 204 });
  request('refused after the session ended', 'POST', '/api/v1/auth/refresh', {
    body: { refresh_token: second.refreshToken }, status: 401,
  });
  const third = toUser(logIn(email));
  const fourth = toUser(request('refresh', 'POST', '/api/v1/auth/refresh', {
    body: { refresh_token: third.refreshToken },
  }));
  request('end other sessions', 'DELETE', '/api/v1/auth/sessions', { token: fourth.token, status: 204 });
  const passwords = { current_password: PASSWORD, new_password: newPassword };
  const changed = toUser(request('change the password', 'PUT', '/api/v1/auth/password', {
    token: fourth.token, body: passwords,
  }));
  request('refused after the password change', 'GET', '/api/v1/auth/me', { token: fourth.token, status: 401 });
  const fifth = toUser(request('login with the new password', 'POST', '/api/v1/auth/login', {
    body: { email, password: passwords.new_password },
  }));
  request('logout', 'POST', '/api/v1/auth/logout', { token: changed.token, status: 204 });
  request('delete the account', 'DELETE', '/api/v1/auth/me', {
    token: fifth.token, body: { password: passwords.new_password }, status: 204,
  });
  request('refused after the account was deleted', 'POST', '/api/v1/auth/login', {
    body: { email, password: passwords.new_password }, status: 401,
  });
}
