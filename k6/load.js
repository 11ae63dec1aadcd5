// Normal load: people who list, read, toggle, edit, create and delete their tasks and now and
// then sign in. Proves that 95 % of the answers of each endpoint come within a second (SC-003) and
// that operations on one's own tasks succeed (SC-001).
//
//   k6 run -e VUS=50 -e DURATION=5m k6/load.js
//
// All sign-ins come from one address: with many virtual users start the service with
// AUTH_RATE_PER_MINUTE=0. A page with plots: K6_WEB_DASHBOARD=true K6_WEB_DASHBOARD_EXPORT=load.html

import { people, thresholds, trendStats } from './lib/api.js';
import { ENDPOINTS, user_journey } from './lib/user_journey.js';

export const options = {
  vus: Number(__ENV.VUS || 20),
  duration: __ENV.DURATION || '1m',
  setupTimeout: '5m',
  thresholds: thresholds(ENDPOINTS),
  summaryTrendStats: trendStats,
};

export const setup = () => people(Number(__ENV.USERS || 20));

export default user_journey;
