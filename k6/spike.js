// A crowd out of nowhere and gone again. While it is there the service may shed some of it with
// 503 and Retry-After, but answers; before and after, everybody is served as in normal load.
//
//   k6 run -e PEAK=2000 k6/spike.js

import { check } from 'k6';
import { call, mine, people, thresholds, trendStats } from './lib/api.js';

const CALM = 20;
const PEAK = Number(__ENV.PEAK || 1000);

const rate = (startTime, stages, exec) => ({
  executor: 'ramping-arrival-rate',
  startRate: CALM,
  startTime,
  stages,
  preAllocatedVUs: Number(__ENV.VUS || 100),
  maxVUs: 1000,
  exec,
});

export const options = {
  scenarios: {
    before: rate('0s', [{ target: CALM, duration: '10s' }], 'calm'),
    spike: rate('10s', [
      { target: PEAK, duration: '1s' },
      { target: PEAK, duration: '20s' },
      { target: CALM, duration: '1s' },
    ], 'crowd'),
    // Five seconds to come to itself again.
    after: rate('37s', [{ target: CALM, duration: '20s' }], 'calm'),
  },
  setupTimeout: '5m',
  thresholds: {
    ...thresholds(['list', 'create']),
    'http_req_duration{name:list in the crowd,expected_response:true}': ['p(95)<1000'],
    'http_req_duration{name:create in the crowd,expected_response:true}': ['p(95)<1000'],
  },
  summaryTrendStats: trendStats,
};

export const setup = () => people(Number(__ENV.USERS || 20));

export function calm(all) {
  const { tasks, token } = mine(all);
  call('list', 'GET', `${tasks}?limit=20`, { token });
  call('create', 'POST', tasks, { token, body: { title: 'Buy milk' }, status: 201 });
}

export function crowd(all) {
  const { tasks, token } = mine(all);
  const shed = Math.random() < 0.2
    ? call('create in the crowd', 'POST', tasks, { token, body: { title: 'Buy milk' }, status: [201, 503] })
    : call('list in the crowd', 'GET', `${tasks}?limit=20`, { token, status: [200, 503] });
  if (shed.status === 503) check(shed, { 'shed with Retry-After': (r) => 'Retry-After' in r.headers });
}
