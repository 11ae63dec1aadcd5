// Every user requests other users' tasks on every route. A single success fails the run (SC-004), as does
// a rejected request for a user's own tasks (SC-002).
//
//   k6 run -e VUS=50 -e DURATION=5m k6/isolation.js

import { Counter } from 'k6/metrics';
import { request, registerUsers, trendStats } from './lib/api.js';

const foreignDataReached = new Counter('foreign_data_reached');

export const options = {
  vus: Number(__ENV.VUS || 10),
  duration: __ENV.DURATION || '30s',
  setupTimeout: '5m',
  thresholds: { foreign_data_reached: ['count==0'], checks: ['rate>0.999'] },
  summaryTrendStats: trendStats,
};

export function setup() {
  return registerUsers(Number(__ENV.USERS || 5)).map((user) => {
    const { tasks, token } = user;
    for (const completed of [true, false]) {
      const body = { title: `secret of ${user.email}`, completed };
      request('create', 'POST', tasks, { token, body, status: 201 });
    }
    const list = request('list', 'GET', tasks, { token });
    return { ...user, list: list.body, ids: list.json().map((task) => task.id) };
  });
}

export default function (all) {
  const me = all[__VU % all.length];
  const them = all.filter((other) => other.email !== me.email)[__ITER % (all.length - 1)];
  const id = them.ids[__ITER % them.ids.length];
  const { token } = me;

  // Other users' paths are forbidden; other users' tasks do not exist under a user's own path.
  for (const [tasks, status] of [[them.tasks, 403], [me.tasks, 404]]) {
    const task = `${tasks}/${id}`;
    checkRefused(request('read', 'GET', task, { token, status }), them);
    checkRefused(request('put', 'PUT', task, { token, status, body: { title: 'taken' } }), them);
    checkRefused(request('patch', 'PATCH', task, { token, status, body: { completed: true } }), them);
    checkRefused(request('toggle', 'PATCH', `${task}/complete`, { token, status }), them);
    checkRefused(request('delete', 'DELETE', task, { token, status }), them);
  }
  checkRefused(request('list', 'GET', them.tasks, { token, status: 403 }), them);
  checkRefused(request('create', 'POST', them.tasks, { token, status: 403, body: { title: 'planted' } }), them);
  checkRefused(request('clear', 'DELETE', `${them.tasks}?completed=true`, { token, status: 403 }), them);
  checkUnchanged(request('search', 'GET', `${me.tasks}?q=secret`, { token }), me);
}

export function teardown(all) {
  for (const user of all) {
    checkUnchanged(request('list', 'GET', user.tasks, { token: user.token }), user);
  }
}

function checkRefused(response, them) {
  if (response.status < 400 || response.body.includes(them.email)) foreignDataReached.add(1);
}

// The list must still be the initial one, byte for byte.
function checkUnchanged(response, user) {
  if (response.status === 200 && response.body !== user.list) foreignDataReached.add(1);
}
