// What a person does on a user_journey: looks at the list, does a few things to single tasks, and now
// and then signs in first.
//
// THINK  seconds that a person takes between two clicks, on average (1)

import { sleep } from 'k6';
import { call, mine, personOf, signIn } from './api.js';

export const ENDPOINTS = ['sign in', 'list', 'create', 'read', 'edit', 'toggle', 'delete'];

const THINK = Number(__ENV.THINK || 1);

// The tasks that this virtual user made and nobody else touches.
const own = [];
let me;

// Out of a hundred clicks on tasks.
const CLICKS = [
  [40, (path) => call('read', 'GET', path, { token: me.token })],
  [25, (path) => call('toggle', 'PATCH', `${path}/complete`, { token: me.token })],
  [15, (path) => call('edit', 'PATCH', path, { token: me.token, body: { description: 'in the evening' } })],
  [20, create],
];

export function user_journey(all) {
  if (!me) {
    me = mine(all);
    // People do not all come at the same instant.
    sleep(THINK * 5 * Math.random());
  }
  // An access token lives a day: few visits begin with a sign-in.
  if (Math.random() < 0.05) me = personOf(signIn(me.email));
  call('list', 'GET', `${me.tasks}?limit=20`, { token: me.token });
  if (own.length === 0) create();
  if (own.length === 0) return;
  for (let clicks = 0; clicks < 5; clicks += 1) {
    sleep(THINK * 2 * Math.random());
    click()(own[Math.floor(Math.random() * own.length)]);
  }
  // What is made is done away with some day: the list stays a person's.
  while (own.length > 4) call('delete', 'DELETE', own.shift(), { token: me.token, status: 204 });
  sleep(THINK * 2 * Math.random());
}

function click() {
  let dice = Math.random() * 100;
  return CLICKS.find(([share]) => (dice -= share) < 0)[1];
}

function create() {
  const body = { title: 'Buy milk', description: 'Two litres' };
  const answer = call('create', 'POST', me.tasks, { token: me.token, body, status: 201 });
  if (answer.status === 201) own.push(answer.headers.Location);
}
