// Everybody tries everybody else's tasks all the time, in every way there is. One success fails
// the run (SC-004), and so does a right that is refused (SC-002).
//
//   k6 run -e VUS=50 -e DURATION=5m k6/isolation.js

import { Counter } from 'k6/metrics';
import { call, people, trendStats } from './lib/api.js';

const reached = new Counter('reached_anothers_data');

export const options = {
  vus: Number(__ENV.VUS || 10),
  duration: __ENV.DURATION || '30s',
  setupTimeout: '5m',
  thresholds: { reached_anothers_data: ['count==0'], checks: ['rate>0.999'] },
  summaryTrendStats: trendStats,
};

export function setup() {
  return people(Number(__ENV.USERS || 5)).map((person) => {
    const { tasks, token } = person;
    for (const completed of [true, false]) {
      const body = { title: `secret of ${person.email}`, completed };
      call('create', 'POST', tasks, { token, body, status: 201 });
    }
    const list = call('list', 'GET', tasks, { token });
    return { ...person, list: list.body, ids: list.json().map((task) => task.id) };
  });
}

export default function (all) {
  const me = all[__VU % all.length];
  const them = all.filter((other) => other.email !== me.email)[__ITER % (all.length - 1)];
  const id = them.ids[__ITER % them.ids.length];
  const { token } = me;

  // Their paths are forbidden; under our own path their tasks do not exist.
  for (const [tasks, status] of [[them.tasks, 403], [me.tasks, 404]]) {
    const task = `${tasks}/${id}`;
    refused(call('read', 'GET', task, { token, status }), them);
    refused(call('put', 'PUT', task, { token, status, body: { title: 'taken' } }), them);
    refused(call('patch', 'PATCH', task, { token, status, body: { completed: true } }), them);
    refused(call('toggle', 'PATCH', `${task}/complete`, { token, status }), them);
    refused(call('delete', 'DELETE', task, { token, status }), them);
  }
  refused(call('list', 'GET', them.tasks, { token, status: 403 }), them);
  refused(call('create', 'POST', them.tasks, { token, status: 403, body: { title: 'planted' } }), them);
  refused(call('clear', 'DELETE', `${them.tasks}?completed=true`, { token, status: 403 }), them);
  untouched(call('search', 'GET', `${me.tasks}?q=secret`, { token }), me);
}

export function teardown(all) {
  for (const person of all) {
    untouched(call('list', 'GET', person.tasks, { token: person.token }), person);
  }
}

function refused(answer, them) {
  if (answer.status < 400 || answer.body.includes(them.email)) reached.add(1);
}

// What a person sees is what was theirs from the beginning, to the byte.
function untouched(answer, person) {
  if (answer.status === 200 && answer.body !== person.list) reached.add(1);
}
