// Front ends that keep their lists up to date: 80 % of the requests are lists with If-None-Match, the
// others wait for a change, read changes since a cursor, and write. Verifies that 95 % of the responses
// of each endpoint arrive within a second, and a waiting request's within a second of its wait.
//
//   k6 run -e VUS=50 -e DURATION=5m k6/sync.js
//
// Start the service with AUTH_RATE_PER_MINUTE=0 and WRITES_PER_MINUTE=0.

import { check, sleep } from 'k6';
import { ownUser, registerUsers, request, thresholds, trendStats } from './lib/api.js';

const THINK = Number(__ENV.THINK || 1);
const WAIT_SECONDS = 2;

export const options = {
  vus: Number(__ENV.VUS || 20),
  duration: __ENV.DURATION || '1m',
  setupTimeout: '5m',
  thresholds: {
    ...thresholds(['conditional list', 'changes', 'create', 'toggle', 'delete']),
    ...thresholds(['wait'], 1000 * (WAIT_SECONDS + 1)),
  },
  summaryTrendStats: trendStats,
};

export const setup = () => registerUsers(Number(__ENV.USERS || 20));

// The state of this virtual user's copy of the list, and the tasks that it created.
let etag = '"none"';
let cursor = '';
const own = [];

function list(me, name, headers) {
  const options = { token: me.token, status: [200, 304], headers: { 'If-None-Match': etag, ...headers } };
  const response = request(name, 'GET', `${me.tasks}?limit=20`, options);
  etag = response.headers.Etag || etag;
}

function changes(me) {
  const path = `${me.tasks.replace('/tasks', '/changes')}?since=${cursor}`;
  const response = request('changes', 'GET', path, { token: me.token });
  if (response.status !== 200) return;
  const page = response.json();
  cursor = page.cursor;
  check(page, { 'changes have no task twice': ({ tasks }) => new Set(tasks.map(({ id }) => id)).size === tasks.length });
}

function write(me) {
  if (own.length < 3) {
    const body = { title: 'Buy milk' };
    const response = request('create', 'POST', me.tasks, { token: me.token, body, status: 201 });
    if (response.status === 201) own.push(response.headers.Location);
  } else if (Math.random() < 0.5) {
    request('toggle', 'PATCH', `${own[0]}/complete`, { token: me.token });
  } else {
    request('delete', 'DELETE', own.shift(), { token: me.token, status: 204 });
  }
}

export default function (users) {
  const me = ownUser(users);
  const dice = Math.random();
  if (dice < 0.8) list(me, 'conditional list', {});
  else if (dice < 0.87) list(me, 'wait', { Prefer: `wait=${WAIT_SECONDS}` });
  else if (dice < 0.94) changes(me);
  else write(me);
  sleep(THINK * 2 * Math.random());
}
