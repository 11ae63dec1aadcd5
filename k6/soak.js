// Normal load for hours at a steady rate, whatever the answers take: what leaks, fills up or slows
// down shows here. Watch the memory and the connections of the service meanwhile.
//
//   k6 run -e RATE=5 -e DURATION=8h k6/soak.js

import { people, thresholds, trendStats } from './lib/api.js';
import { ENDPOINTS, user_journey } from './lib/user_journey.js';

export const options = {
  scenarios: {
    soak: {
      executor: 'constant-arrival-rate',
      // Visits a second; each is about seven requests and ten seconds long.
      rate: Number(__ENV.RATE || 2),
      duration: __ENV.DURATION || '1h',
      preAllocatedVUs: Number(__ENV.VUS || 50),
    },
  },
  setupTimeout: '5m',
  // A user_journey that nobody was free to make was not made: the service was too slow for the rate.
  thresholds: { ...thresholds(ENDPOINTS), dropped_iterations: ['count==0'] },
  summaryTrendStats: trendStats,
};

export const setup = () => people(Number(__ENV.USERS || 20));

export default user_journey;
