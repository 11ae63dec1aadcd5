// Sixteen clients sign in without pause while others read: hashing passwords must not slow
// anybody's tasks down. A sign-in may be shed (503 with Retry-After), a read may not, and 95 % of
// the reads come within READ_P95 milliseconds.
//
//   k6 run -e DURATION=1m k6/login-storm.js
//
// Start the service with AUTH_RATE_PER_MINUTE=0, or its brake ends the storm: one address is
// allowed 300 sign-ins a minute.

import { call, mine, PASSWORD, people, thresholds, trendStats } from './lib/api.js';

const duration = __ENV.DURATION || '30s';

export const options = {
  scenarios: {
    read: { executor: 'constant-vus', vus: Number(__ENV.VUS || 16), duration, exec: 'read' },
    storm: { executor: 'constant-vus', vus: 16, duration, exec: 'storm' },
  },
  setupTimeout: '5m',
  thresholds: thresholds(['read'], Number(__ENV.READ_P95 || 100)),
  summaryTrendStats: trendStats,
};

export function setup() {
  return people(Number(__ENV.USERS || 16)).map((person) => {
    const body = { title: 'Buy milk' };
    const { headers } = call('create', 'POST', person.tasks, { token: person.token, body, status: 201 });
    return { ...person, task: headers.Location };
  });
}

export function read(all) {
  const { task, token } = mine(all);
  call('read', 'GET', task, { token });
}

export function storm(all) {
  const body = { email: mine(all).email, password: PASSWORD };
  call('sign in', 'POST', '/api/v1/auth/login', { body, status: [200, 503] });
}
