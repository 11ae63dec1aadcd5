// Sixteen clients log in continuously while others read tasks: password hashing must not slow down the
// reads. Logins may be rejected with 503, reads may not, and 95 % of the reads take less than READ_P95
// milliseconds.
//
//   k6 run -e DURATION=1m k6/login-storm.js
//
// Start the service with AUTH_RATE_PER_MINUTE=0; otherwise the rate limit rejects most logins.

import { request, ownUser, PASSWORD, registerUsers, thresholds, trendStats } from './lib/api.js';

const duration = __ENV.DURATION || '30s';

export const options = {
  scenarios: {
    read: { executor: 'constant-vus', vus: Number(__ENV.VUS || 16), duration, exec: 'read' },
    logIns: { executor: 'constant-vus', vus: 16, duration, exec: 'logIns' },
  },
  setupTimeout: '5m',
  thresholds: thresholds(['read'], Number(__ENV.READ_P95 || 100)),
  summaryTrendStats: trendStats,
};

export function setup() {
  return registerUsers(Number(__ENV.USERS || 16)).map((user) => {
    const body = { title: 'Buy milk' };
    const { headers } = request('create', 'POST', user.tasks, { token: user.token, body, status: 201 });
    return { ...user, task: headers.Location };
  });
}

export function read(all) {
  const { task, token } = ownUser(all);
  request('read', 'GET', task, { token });
}

export function logIns(all) {
  const body = { email: ownUser(all).email, password: PASSWORD };
  request('login', 'POST', '/api/v1/auth/login', { body, status: [200, 503] });
}
