// Normal load: users list, read, toggle, edit, create and delete their tasks, and sometimes log in.
// Verifies that 95 % of the responses of each endpoint arrive within a second (SC-003) and that
// operations on a user's own tasks succeed (SC-001).
//
//   k6 run -e VUS=50 -e DURATION=5m k6/load.js
//
// All logins come from one address. With many virtual users, start the service with
// AUTH_RATE_PER_MINUTE=0 and WRITES_PER_MINUTE=0. For an HTML report: K6_WEB_DASHBOARD=true K6_WEB_DASHBOARD_EXPORT=load.html

import { registerUsers, thresholds, trendStats } from './lib/api.js';
import { ENDPOINTS, userJourney } from './lib/user_journey.js';

export const options = {
  vus: Number(__ENV.VUS || 20),
  duration: __ENV.DURATION || '1m',
  setupTimeout: '5m',
  thresholds: thresholds(ENDPOINTS),
  summaryTrendStats: trendStats,
};

export const setup = () => registerUsers(Number(__ENV.USERS || 20));

export default userJourney;
