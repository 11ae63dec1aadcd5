// One visit of a user: list the tasks, then read, change, create and delete some of them. A few
// visits start with a login.
//
// THINK  average seconds between two requests of a user (1)

import { sleep } from 'k6';
import { request, ownUser, toUser, logIn } from './api.js';

export const ENDPOINTS = ['login', 'list', 'create', 'read', 'edit', 'toggle', 'delete'];

const THINK = Number(__ENV.THINK || 1);

// The tasks that this virtual user created; no other one changes them.
const own = [];
let me;

// The share of each action, in percent.
const ACTIONS = [
  [40, (path) => request('read', 'GET', path, { token: me.token })],
  [25, (path) => request('toggle', 'PATCH', `${path}/complete`, { token: me.token })],
  [15, (path) => request('edit', 'PATCH', path, { token: me.token, body: { description: 'in the evening' } })],
  [20, create],
];

export function userJourney(all) {
  if (!me) {
    me = ownUser(all);
    // Spread the first requests.
    sleep(THINK * 5 * Math.random());
  }
  // An access token is valid for a day, so few visits start with a login.
  if (Math.random() < 0.05) me = toUser(logIn(me.email));
  request('list', 'GET', `${me.tasks}?limit=20`, { token: me.token });
  if (own.length === 0) create();
  if (own.length === 0) return;
  for (let actions = 0; actions < 5; actions += 1) {
    sleep(THINK * 2 * Math.random());
    pickAction()(own[Math.floor(Math.random() * own.length)]);
  }
  // Delete as many tasks as are created, so that the list stays short.
  while (own.length > 4) request('delete', 'DELETE', own.shift(), { token: me.token, status: 204 });
  sleep(THINK * 2 * Math.random());
}

function pickAction() {
  let dice = Math.random() * 100;
  return ACTIONS.find(([share]) => (dice -= share) < 0)[1];
}

function create() {
  const body = { title: 'Buy milk', description: 'Two litres' };
  const response = request('create', 'POST', me.tasks, { token: me.token, body, status: 201 });
  if (response.status === 201) own.push(response.headers.Location);
}
