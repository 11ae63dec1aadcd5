// Normal load at a constant rate for hours, to find leaks and gradual slowdown. Watch the memory and
// the connections of the service meanwhile.
//
//   k6 run -e RATE=5 -e DURATION=8h k6/soak.js

import { registerUsers, thresholds, trendStats } from './lib/api.js';
import { ENDPOINTS, userJourney } from './lib/user_journey.js';

export const options = {
  scenarios: {
    soak: {
      executor: 'constant-arrival-rate',
      // Visits per second; each takes about ten seconds and seven requests.
      rate: Number(__ENV.RATE || 2),
      duration: __ENV.DURATION || '1h',
      preAllocatedVUs: Number(__ENV.VUS || 50),
    },
  },
  setupTimeout: '5m',
  // An iteration is dropped when all virtual users are busy: the service was too slow for the rate.
  thresholds: { ...thresholds(ENDPOINTS), dropped_iterations: ['count==0'] },
  summaryTrendStats: trendStats,
};

export const setup = () => registerUsers(Number(__ENV.USERS || 20));

export default userJourney;
