// A sudden spike of requests. During the spike the service may reject some of them with 503 and
// Retry-After, but must respond to all; before and after the spike, the thresholds of normal load hold.
//
//   k6 run -e PEAK=2000 k6/spike.js

import { check } from 'k6';
import { request, ownUser, registerUsers, thresholds, trendStats } from './lib/api.js';

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
    ], 'spike'),
    // Five seconds to recover.
    after: rate('37s', [{ target: CALM, duration: '20s' }], 'calm'),
  },
  setupTimeout: '5m',
  thresholds: {
    ...thresholds(['list', 'create']),
    'http_req_duration{name:list during the spike,expected_response:true}': ['p(95)<1000'],
    'http_req_duration{name:create during the spike,expected_response:true}': ['p(95)<1000'],
  },
  summaryTrendStats: trendStats,
};

export const setup = () => registerUsers(Number(__ENV.USERS || 20));

export function calm(all) {
  const { tasks, token } = ownUser(all);
  request('list', 'GET', `${tasks}?limit=20`, { token });
  request('create', 'POST', tasks, { token, body: { title: 'Buy milk' }, status: 201 });
}

export function spike(all) {
  const { tasks, token } = ownUser(all);
  const response = Math.random() < 0.2
    ? request('create during the spike', 'POST', tasks, { token, body: { title: 'Buy milk' }, status: [201, 503] })
    : request('list during the spike', 'GET', `${tasks}?limit=20`, { token, status: [200, 503] });
  if (response.status === 503) check(response, { 'refused with Retry-After': (r) => 'Retry-After' in r.headers });
}
