//! The cost of the statements under `sql/` on large tables: with generic and with custom plans, each
//! statement reads little more than it returns.

use std::collections::BTreeSet;

use serde_json::Value;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::harness::Database;
use crate::sql::files;

/// 100 users with 1,000 tasks each that were created in turn, so that a page of the table rarely has two
/// tasks of one user. The n-th user, task and session has the id `nth(n)`; user 7 has the tasks 6, 106
/// to 99906, and user 5000 has a hundred sessions. Nothing is due for a purge.
const ROWS: &str = "
create function nth(n bigint) returns uuid immutable language sql as
$$ select lpad(to_hex(n), 32, '0')::uuid $$;
create function hash(n bigint) returns text immutable language sql as
$$ select rpad('$2b$12$' || n || '.', 60, 'x') $$;
create function moment(n bigint) returns timestamptz immutable language sql as
$$ select timestamptz '2025-01-01 00:00:00z' + n * interval '1 second' $$;

insert into users (id, email, password_hash, created_at, updated_at)
select nth(n), 'user' || n || '@example.com', hash(n), moment(n), moment(n)
from generate_series(1, 5000) n;

insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
select nth(1 + n % 100), nth(n),
       case n / 100 % 100 when 3 then 'water the plants ' else 'sweep the floor ' end || n,
       repeat('and then ', 8) || 'rest', n / 100 % 40 = 0, moment(n), moment(n), 2 * (n / 100) + 1
from generate_series(0, 99999) n;

insert into deleted_tasks (user_id, revision, id, deleted_at)
select nth(1 + n % 100), 2 * (n / 100) + 2, nth(1000000 + n), now() - n * interval '8 seconds'
from generate_series(0, 99999) n;
update task_lists set revision = 2000, tasks = 1000 where user_id <= nth(100);

insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at, expires_at,
                      user_agent)
select nth(n), nth(case when n % 65 = 0 and n <= 6500 then 5000 else 1 + n % 4999 end), 3, now(), now(), now(),
       now() + interval '1 day' + n * interval '1 second',
       'Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0'
from generate_series(1, 13000) n;

insert into revocations (session_id, ended_at, xid)
select nth(1000000 + n), now() - interval '1 hour' - n * interval '7 seconds', '100'
from generate_series(1, 10000) n;

insert into login_failures (account, network, failures, last_failure_at)
select account || n, network, 3, now() - n * interval '8 seconds'
from generate_series(1, 3000) n,
     (values ('user', '192.0.2.7'), ('user', '*'), ('nobody', '192.0.2.7')) a (account, network);
update login_failures set account = account || '@example.com';
insert into login_failures (account, network, failures, last_failure_at)
select nth(n), 'session', 3, now() - n * interval '8 seconds' from generate_series(1, 1000) n;

-- User 8 has the maximum.
insert into login_networks (user_id, network, last_used_at)
select nth(n), '192.0.2.' || network, now() - interval '1 day' - network * interval '1 minute'
from generate_series(1, 5000) n, generate_series(1, case n when 8 then 100 else 2 end) network;

insert into idempotency_keys (user_id, key, task_id, title, description, completed, created_at)
select nth(1 + n % 5000), 'key ' || n, nth(n), 'sweep the floor', null, false,
       now() - n * interval '8 seconds'
from generate_series(1, 10000) n;

insert into pending_registrations (email, id, password_hash, registered_at)
select 'pending' || n || '@example.com', nth(2000000 + n), hash(n), now() - n * interval '100 seconds'
from generate_series(1, 3000) n;

-- Even users have used up their quota.
insert into mail_requests (email, latest_at, second_at, third_at)
select 'user' || n || '@example.com', now() - n * interval '1 second', now() - interval '51 minutes',
       case n % 2 when 0 then now() - interval '55 minutes' end
from generate_series(1, 3000) n";

const TABLES: [&str; 11] = [
    "users",
    "task_lists",
    "tasks",
    "deleted_tasks",
    "sessions",
    "revocations",
    "login_failures",
    "login_networks",
    "idempotency_keys",
    "pending_registrations",
    "mail_requests",
];

/// PostgreSQL uses custom plans for the first five executions of a prepared statement, and then a
/// generic plan if that is not more expensive. A connection may use either.
const PLANS: [&str; 2] = ["force_generic_plan", "force_custom_plan"];

/// A statement with parameters, and the cost that is allowed.
struct Case {
    /// The statement's path under `sql/`.
    file: &'static str,
    /// A description of the case.
    what: &'static str,
    /// The parameters, as a list of SQL expressions.
    with: &'static str,
    /// Statements that prepare the case in the same transaction.
    given: &'static str,
    /// The rows that it returns, or changes if it returns none.
    rows: u64,
    /// The most accesses to pages of tables and indexes, including those of triggers and cascades.
    pages: u64,
    /// The most rows that it may read without returning them.
    rows_discarded: u64,
    /// The most rows that a generic plan may sort. Sorting a few is as fast as reading them in order.
    sorted: u64,
    /// Why a sequential scan is allowed; empty if it is not.
    reads_all: &'static str,
}

const DEFAULT_CASE: Case = Case {
    file: "",
    what: "",
    with: "",
    given: "",
    rows: 0,
    pages: 0,
    rows_discarded: 0,
    sorted: 0,
    reads_all: "",
};

macro_rules! cases {
    ($($file:literal { $($what:literal: $with:literal => $($field:ident $value:expr),+;)+ })+) => {
        const CASES: &[Case] = &[$($(
            Case { file: $file, what: $what, with: $with, $($field: $value,)+ ..DEFAULT_CASE },
        )+)+];
    };
}

/// An index lookup and the row: up to 4 pages.
const A_ROW: u64 = 8;
/// A row written or deleted with all its index entries, and the row that a foreign key checks or a
/// trigger writes: 9 to 16 pages.
const A_WRITE: u64 = 30;
/// 51 scattered rows: a page each, and 3 to 6 pages of the index.
const FIFTY_ONE: u64 = 70;
/// All 1,000 tasks of a user: a page each, and up to 26 pages of the index.
const THOUSAND: u64 = 1100;
/// A batch of a purge. Each row is found, locked and deleted.
const A_BATCH: u64 = 500 * 6;

// The limits are about twice the measured cost, unless the rows that a case reads account for most
// of the cost.
cases! {
    "deleted_tasks/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        // Every list is read, because there are few.
        "twenty are due": "" => rows 20, pages 700, reads_all "the table of lists is small",
            given "update deleted_tasks set deleted_at = now() - interval '31 days'
                   where id between nth(1000100) and nth(1000119)";
        "thousands are due": "" => rows 500, pages 3 * A_BATCH, reads_all "the table of lists is small",
            given "update deleted_tasks set deleted_at = now() - interval '31 days'
                   where id < nth(1005000)";
    }
    "idempotency_keys/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        "twenty are due": "" => rows 20, pages 130,
            given "update idempotency_keys set created_at = now() - interval '2 days'
                   where user_id between nth(11) and nth(20)";
        "thousands are due": "" => rows 500, pages A_BATCH,
            given "update idempotency_keys set created_at = now() - interval '2 days'
                   where user_id <= nth(2000)";
    }
    "idempotency_keys/trim.sql" {
        // Reads all keys of the user.
        "few keys": "nth(7)" => rows 0, pages 2 * A_ROW, rows_discarded 2, sorted 2;
        "51 too many": "nth(7)" => rows 51, pages 4 * THOUSAND, rows_discarded 10000, sorted 10051,
            given "insert into idempotency_keys (user_id, key, task_id, title, completed, created_at)
                   select nth(7), 'more ' || n, nth(n), 'dust', false,
                          now() + n * interval '1 second' from generate_series(1, 10049) n";
    }
    "login_failures/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        "twenty are due": "" => rows 20, pages 130,
            given "update login_failures set last_failure_at = now() - interval '2 days'
                   where account ~ '^nobody7[67][0-9]@'";
        "thousands are due": "" => rows 500, pages A_BATCH,
            given "update login_failures set last_failure_at = now() - interval '2 days'
                   where account ~ '^user'";
    }
    "login_failures/record.sql" {
        "the first failure": "'new@example.com', '192.0.2.9'" => rows 1, pages 2 * A_WRITE;
        "a failure for an unknown address": "'nobody7@example.com', '192.0.2.7'" =>
            rows 1, pages 2 * A_WRITE;
        "a failure from an unused network": "'user7@example.com', '192.0.2.7'" => rows 1, pages 2 * A_WRITE;
        "a failure from a known network": "'user7@example.com', '192.0.2.2'" =>
            rows 1, pages 2 * A_WRITE;
        "a failed confirmation": "nth(7)::text, 'session'" => rows 1, pages A_WRITE;
        "a failure during a lockout": "'user7@example.com', '192.0.2.7'" =>
            rows 1, pages 2 * A_WRITE, rows_discarded 1,
            given "update login_failures set blocked_until = now() + interval '1 hour'
                   where account = 'user7@example.com'";
    }
    "login_networks/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        "twenty are due": "" => rows 20, pages 130,
            given "update login_networks set last_used_at = now() - interval '31 days'
                   where user_id between nth(11) and nth(20)";
        "thousands are due": "" => rows 500, pages A_BATCH,
            given "update login_networks set last_used_at = now() - interval '31 days'
                   where user_id <= nth(2000)";
    }
    "mail_requests/count.sql" {
        "an account": "'user7@example.com'" => rows 1, pages A_WRITE;
        "a pending registration": "'pending7@example.com'" => rows 1, pages A_WRITE;
        "an unknown address": "'nobody@example.com'" => rows 1, pages A_WRITE;
        "the quota is used up": "'user8@example.com'" => rows 0, pages A_WRITE;
    }
    "mail_requests/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        "twenty are due": "" => rows 20, pages 130,
            given "update mail_requests set latest_at = now() - interval '2 days'
                   where email ~ '^user17[67][0-9]@'";
    }
    "pending_registrations/confirm.sql" {
        "a registration": "nth(2000007), hash(7), hash(8)" => rows 1, pages 3 * A_WRITE;
        "a registration of a taken address": "nth(2000007), hash(7), hash(8)" => rows 1, pages 3 * A_WRITE,
            given "update users set email = 'pending7@example.com' where id = nth(7)";
        "the registration was replaced": "nth(2000007), hash(9), hash(8)" =>
            rows 0, pages A_ROW, rows_discarded 1;
    }
    "pending_registrations/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        "twenty are due": "" => rows 20, pages 170,
            given "update pending_registrations set registered_at = now() - interval '9 days'
                   where id between nth(2000011) and nth(2000030)";
    }
    "pending_registrations/replace.sql" {
        "a new address": "nth(500000), 'new@example.com', hash(1)" => rows 1, pages A_WRITE;
        "a pending address": "nth(500000), 'pending7@example.com', hash(1)" => rows 1, pages A_WRITE;
    }
    "revocations/since.sql" {
        "the first read": "null, null" => rows 10_001, pages 230,
            reads_all "returns every row";
        "nothing was revoked": "200, pg_postmaster_start_time()" => rows 1, pages A_ROW;
        "five were revoked": "200, pg_postmaster_start_time()" => rows 6, pages A_ROW,
            given "update revocations set xid = '300' where session_id <= nth(1000005)";
        "five were restored from a dump": "200, pg_postmaster_start_time()" => rows 1, pages A_ROW,
            given "update revocations set xid = '9000000000000' where session_id <= nth(1000005)";
        "after a restart": "200, now()" => rows 10_001, pages 230,
            reads_all "returns every row";
    }
    "revocations/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        "twenty are due": "" => rows 20, pages 130,
            given "update revocations set ended_at = now() - interval '2 days'
                   where session_id <= nth(1000020)";
        "thousands are due": "" => rows 500, pages A_BATCH,
            given "update revocations set ended_at = now() - interval '2 days'
                   where session_id <= nth(1004000)";
    }
    "sessions/end.sql" {
        "own session": "nth(7), nth(6), 0" => rows 1, pages A_WRITE;
        "another user's": "nth(7), nth(7), 0" => rows 0, pages A_ROW;
    }
    "sessions/end_by_refresh_token.sql" {
        "an active session": "nth(6), 3" => rows 1, pages A_WRITE;
        "an ended session": "nth(500000), 3" => rows 0, pages A_ROW;
    }
    "sessions/end_others.sql" {
        "one other": "nth(7), nth(6)" => rows 1, pages A_WRITE, rows_discarded 1;
        // Three pages for a session, nine for its revocation.
        "the maximum of others": "nth(5000), nth(65)" => rows 99, pages 99 * 20, rows_discarded 1;
    }
    "sessions/end_reused.sql" {
        "a used token": "nth(6), 2" => rows 1, pages A_WRITE;
        "an unused token": "nth(6), 3" => rows 0, pages A_ROW, rows_discarded 1;
        "an ended session": "nth(500000), 2" => rows 0, pages A_ROW;
    }
    "sessions/list.sql" {
        "two": "nth(7)" => rows 2, pages A_ROW, sorted 2;
        "a hundred": "nth(5000)" => rows 100, pages 130, sorted 100;
    }
    "sessions/refresh.sql" {
        // Writes a new version of the row, with entries in three indexes.
        "the newest token": "nth(6), 3, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 1, pages 60, rows_discarded 3;
        "within the hour": "nth(6), 3, 1e6, 1e6, 1e7, '192.0.2.1'" =>
            rows 1, pages 40, rows_discarded 1,
            given "update login_networks set last_used_at = now() where user_id = nth(7)";
        // Reads all networks of the user to find the oldest.
        "from one network too many": "nth(7), 3, 1e6, 1e6, 1e7, '192.0.2.200'" =>
            rows 1, pages 90, rows_discarded 99;
        "the previous token": "nth(6), 2, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 1, pages 60, rows_discarded 3;
        "an older token": "nth(6), 1, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 0, pages A_ROW, rows_discarded 1;
        "an ended session": "nth(500000), 1, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 0, pages A_ROW;
    }
    "sessions/renew.sql" {
        "one other": "nth(7), nth(6), 1e6, 1e7" => rows 1, pages 3 * A_WRITE, rows_discarded 1;
        "an ended session": "nth(7), nth(500000), 1e6, 1e7" => rows 1, pages 2 * A_WRITE;
        "no session to keep": "nth(7), null, 1e6, 1e7" => rows 1, pages 2 * A_WRITE;
    }
    "sessions/login.sql" {
        "after wrong attempts":
            "nth(7), hash(7), hash(7), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 1, pages 3 * A_WRITE, rows_discarded 3;
        "with an old hash":
            "nth(7), hash(7), hash(70000), nth(500000), 1e6, 'Firefox', '192.0.2.1'" =>
            rows 1, pages 4 * A_WRITE, rows_discarded 5;
        "from one network too many":
            "nth(8), hash(8), hash(8), nth(500000), 1e6, 'Firefox', '192.0.2.200'" =>
            rows 1, pages 4 * A_WRITE, rows_discarded 99;
        // Reads and sorts all hundred.
        "beyond a hundred sessions":
            "nth(5000), hash(5000), hash(5000), nth(500000), 1e6, 'Firefox', '192.0.2.1'" =>
            rows 1, pages 130 + 4 * A_WRITE, rows_discarded 3;
        "during a lockout":
            "nth(7), hash(7), hash(7), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages 2 * A_ROW, rows_discarded 1,
            given "update login_failures set blocked_until = now() + interval '1 hour'
                   where account = 'user7@example.com' and network = '*'";
        "the password was changed":
            "nth(7), hash(8), hash(8), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages A_ROW, rows_discarded 1;
        "an unknown user": "nth(500000), hash(8), hash(8), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages A_ROW;
    }
    "sessions/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        // Here and below, the trigger reads each old row: one more page.
        "twenty are due": "" => rows 20, pages 170,
            given "update sessions set expires_at = now() - interval '2 days'
                   where id between nth(11) and nth(30)";
        "thousands are due": "" => rows 500, pages A_BATCH + 1000,
            given "update sessions set expires_at = now() - interval '2 days'
                   where id <= nth(3000)";
    }
    "task_lists/changes.sql" {
        // Merges tasks and tombstones, and sorts those of one revision.
        "nothing has changed": "nth(7), 2000, nth(0), 2000, nth(0), 101" => rows 1, pages 2 * A_ROW, sorted 1;
        "the first page": "nth(7), 0, nth(0), 9000, nth(0), 51" => rows 51, pages FIFTY_ONE, sorted 52, rows_discarded 1;
        "a middle page": "nth(7), 1000, nth(0), 1000, nth(0), 51" => rows 51, pages 2 * FIFTY_ONE, sorted 52, rows_discarded 1;
        "the last changes": "nth(7), 1990, nth(0), 1990, nth(0), 51" => rows 11, pages 4 * A_ROW, sorted 11;
        "the longest page": "nth(7), 0, nth(0), 9000, nth(0), 101" => rows 101, pages 2 * FIFTY_ONE, sorted 102, rows_discarded 1;
    }
    "task_lists/revisions.sql" {
        // Two pages of an index and one of the table: no page of a task.
        "a list": "array[nth(7)]" => rows 1, pages 3;
        "no account": "array[nth(500000)]" => rows 0, pages 3;
        "a batch of three": "array[nth(7), nth(8), nth(9)]" => rows 3, pages 9;
    }
    "tasks/count.sql" {
        // Reads only the index.
        "all": "nth(7), null, null" => rows 1, pages 30;
        // A filter reads all tasks of the user.
        "the completed": "nth(7), true, null" => rows 1, pages THOUSAND, rows_discarded 975;
        "a search": "nth(7), null, 'PLANTS'" => rows 1, pages THOUSAND, rows_discarded 990;
    }
    "tasks/create.sql" {
        "a task": "nth(7), nth(500000), 'dust the shelf', null, false, moment(500000), 5000000" =>
            rows 1, pages A_WRITE;
    }
    "tasks/create_batch.sql" {
        "a task": "array[nth(7)], array[nth(500000)], array['dust'], array[null], array[false], array[moment(500000)], array[5000000], array[null]" =>
            rows 1, pages A_WRITE + A_ROW, rows_discarded 1, sorted 1;
        "a new key": "array[nth(7)], array[nth(500000)], array['dust'], array[null], array[false], array[moment(500000)], array[5000000], array['new']" =>
            rows 1, pages 2 * A_WRITE + A_ROW, sorted 1;
        "a known key": "array[nth(7)], array[nth(500000)], array['dust'], array[null], array[false], array[moment(500000)], array[5000000], array['key 6']" =>
            rows 0, pages A_WRITE, rows_discarded 1, sorted 1;
        "a batch of three": "array[nth(7), nth(8), nth(9)], array[nth(500000), nth(500001), nth(500002)], array['dust', 'dust', 'dust'], array[null, null, null], array[false, false, false], array[moment(500000), moment(500000), moment(500000)], array[5000000, 5000000, 5000000], array[null, null, null]" =>
            rows 3, pages 3 * (A_WRITE + A_ROW), rows_discarded 3, sorted 3;
    }
    "tasks/create_idempotent.sql" {
        "a new key": "nth(7), nth(500000), 'dust', null, false, moment(500000), 5000000, 'new'" =>
            rows 1, pages 3 * A_WRITE;
        "a known key": "nth(7), nth(500000), 'dust', null, false, moment(500000), 5000000, 'key 6'" =>
            rows 1, pages 2 * A_WRITE, rows_discarded 1;
        "an old key": "nth(7), nth(500000), 'dust', null, false, moment(500000), 5000000, 'key 6'" =>
            rows 1, pages 3 * A_WRITE,
            given "update idempotency_keys set created_at = now() - interval '2 days'
                   where user_id = nth(7)";
    }
    "tasks/create_with_id.sql" {
        "a new id": "nth(7), nth(500000), 'dust', null, false, moment(500000), 100000" =>
            rows 1, pages 3 * A_WRITE;
        "an id that exists": "nth(7), nth(50006), 'dust', null, false, moment(500000), 100000" =>
            rows 1, pages 3 * A_ROW;
        // Without an index on the id, the function reads all tombstones of the user: ten pages more.
        "an id that was deleted": "nth(7), nth(1099906), 'dust', null, false, moment(500000), 100000" =>
            rows 1, pages 22, rows_discarded 1;
        "too many tasks": "nth(7), nth(500000), 'dust', null, false, moment(500000), 1000" =>
            rows 1, pages 2 * A_ROW, rows_discarded 1;
    }
    "tasks/delete.sql" {
        // Also changes the list and writes a tombstone.
        "any version": "nth(7), nth(50006), null, true" => rows 1, pages 3 * A_WRITE;
        "this version": "nth(7), nth(50006), array[moment(1), moment(50006)], true" =>
            rows 1, pages 3 * A_WRITE;
        "another version": "nth(7), nth(50006), array[moment(1)], true" =>
            rows 1, pages 2 * A_ROW, rows_discarded 1;
        "any but another": "nth(7), nth(50006), array[moment(1)], false" =>
            rows 1, pages 3 * A_WRITE;
        "another user's": "nth(7), nth(50007), array[moment(50007)], true" =>
            rows 1, pages 2 * A_ROW;
    }
    "tasks/delete_completed.sql" {
        // Reads all tasks of the user.
        "25 of 1,000": "nth(7)" => rows 1, pages THOUSAND + 25 * 2 * A_WRITE, rows_discarded 975;
        "no tasks": "nth(4000)" => rows 1, pages 2 * A_ROW, rows_discarded 1;
    }
    "tasks/delete_batch.sql" {
        "a task": "array[nth(7)], array[nth(50006)]" => rows 1, pages 2 * A_WRITE, sorted 1;
        "another user's": "array[nth(7)], array[nth(50007)]" => rows 0, pages 2 * A_ROW;
        "a batch of three": "array[nth(7), nth(8), nth(9)], array[nth(50006), nth(50007), nth(50008)]" =>
            rows 3, pages 6 * A_WRITE, sorted 3;
    }
    "tasks/get_batch.sql" {
        "a task": "array[nth(7)], array[nth(50006)]" => rows 1, pages A_ROW;
        "none": "array[nth(7)], array[nth(500000)]" => rows 0, pages A_ROW;
        "another user's": "array[nth(7)], array[nth(50007)]" => rows 0, pages A_ROW;
        "a batch of three": "array[nth(7), nth(8), nth(9)], array[nth(50006), nth(50006), nth(50008)]"
            => rows 2, pages 3 * A_ROW;
    }
    "tasks/list_newest.sql" {
        "the first page": "nth(7), null, null, null, 51, 1048577" => rows 51, pages FIFTY_ONE;
        "a middle page": "nth(7), null, null, nth(50006), 51, 1048577" => rows 51, pages FIFTY_ONE;
        "the last page": "nth(7), null, null, nth(3006), 51, 1048577" => rows 30, pages FIFTY_ONE;
        "all": "nth(7), null, null, null, 1001, 1048577" => rows 1000, pages THOUSAND;
        "no tasks": "nth(4000), null, null, null, 1001, 1048577" => rows 1, pages A_ROW;
        "the first open": "nth(7), false, null, null, 51, 1048577" => rows 51, pages FIFTY_ONE, rows_discarded 1;
        // A filter with few matches reads all tasks of the user.
        "the completed": "nth(7), true, null, null, 51, 1048577" => rows 25, pages THOUSAND, rows_discarded 975;
        "a search": "nth(7), null, 'PLANTS', null, 51, 1048577" => rows 10, pages THOUSAND, rows_discarded 990;
    }
    "tasks/list_oldest.sql" {
        "the first page": "nth(7), null, null, null, 51, 1048577" => rows 51, pages FIFTY_ONE;
        "a middle page": "nth(7), null, null, nth(50006), 51, 1048577" => rows 51, pages FIFTY_ONE;
        "the last page": "nth(7), null, null, nth(96906), 51, 1048577" => rows 30, pages FIFTY_ONE;
        "all": "nth(7), null, null, null, 1001, 1048577" => rows 1000, pages THOUSAND;
        "no tasks": "nth(4000), null, null, null, 1001, 1048577" => rows 1, pages A_ROW;
        "the first open": "nth(7), false, null, null, 51, 1048577" => rows 51, pages FIFTY_ONE, rows_discarded 2;
        // A filter with few matches reads all tasks of the user.
        "the completed": "nth(7), true, null, null, 51, 1048577" => rows 25, pages THOUSAND, rows_discarded 975;
        "a search": "nth(7), null, 'PLANTS', null, 51, 1048577" => rows 10, pages THOUSAND, rows_discarded 990;
    }
    "tasks/list_newest_batch.sql" {
        "the first page": "array[nth(7)], array[null]::uuid[], array[51]" => rows 51, pages FIFTY_ONE;
        "a middle page": "array[nth(7)], array[nth(50006)], array[51]" => rows 51, pages FIFTY_ONE;
        "the last page": "array[nth(7)], array[nth(3006)], array[51]" => rows 30, pages FIFTY_ONE;
        "no tasks": "array[nth(4000)], array[null]::uuid[], array[51]" => rows 1, pages A_ROW;
        "a batch of three":
            "array[nth(7), nth(8), nth(9)], array[null, nth(50007), null]::uuid[], array[51, 51, 1]"
            => rows 103, pages 2 * FIFTY_ONE + A_ROW;
    }
    "tasks/update_batch.sql" {
        "a task": "array[nth(7)], array[nth(50006)], array['dust'], array[false], array[null], array[false], array[null]::boolean[]" =>
            rows 1, pages A_WRITE + 2 * A_ROW, sorted 1;
        "another user's": "array[nth(7)], array[nth(50007)], array['dust'], array[false], array[null], array[false], array[null]::boolean[]" =>
            rows 0, pages 2 * A_ROW;
        "a batch of three": "array[nth(7), nth(8), nth(9)], array[nth(50006), nth(50007), nth(50008)], array['dust', null, null], array[false, true, false], array[null, null, null], array[false, false, true], array[null, null, null]::boolean[]" =>
            rows 3, pages 3 * (A_WRITE + 2 * A_ROW), sorted 3;
    }
    "tasks/update.sql" {
        "any version": "nth(7), nth(50006), null, false, null, true, null, null, true" =>
            rows 1, pages A_WRITE + A_ROW;
        "this version":
            "nth(7), nth(50006), 'dust', true, null, false, true, array[moment(1), moment(50006)], true" =>
            rows 1, pages A_WRITE + A_ROW;
        "another version":
            "nth(7), nth(50006), 'dust', true, null, false, true, array[moment(1)], true" =>
            rows 1, pages 2 * A_ROW, rows_discarded 2;
        "any but another":
            "nth(7), nth(50006), 'dust', true, null, false, true, array[moment(1)], false" =>
            rows 1, pages A_WRITE + A_ROW;
        "another user's":
            "nth(7), nth(50007), 'dust', true, null, false, true, array[moment(50007)], true" =>
            rows 1, pages 2 * A_ROW;
    }
    "users/accounts.sql" {
        // The account, its list, sessions, networks and failures.
        "an account": "'user7@example.com', 1" => rows 1, pages 5 * A_ROW, rows_discarded 3;
        "fifty": "'user7@example.com', 50" => rows 50, pages 50 * 5 * A_ROW, rows_discarded 150;
    }
    "users/delete.sql" {
        // Nine pages per task and tombstone, to find and to delete them.
        "with 1,000 tasks": "nth(7), hash(7)" => rows 1, pages 11_000, rows_discarded 3;
        // The account, a session with its revocation, and two keys.
        "without tasks": "nth(4000), hash(4000)" => rows 1, pages 3 * A_WRITE;
        "the password was changed": "nth(7), hash(8)" => rows 0, pages 2 * A_ROW, rows_discarded 2;
        "by an operator": "nth(4000), null" => rows 1, pages 3 * A_WRITE;
    }
    "users/export.sql" {
        "with 1,000 tasks": "nth(7)" => rows 1, pages 3 * THOUSAND, sorted 1000, reads_all "the failures of the first release are few";
        "an unknown user": "nth(500000)" => rows 0, pages A_ROW, reads_all "the failures of the first release are few";
    }
    "users/for_mail_token.sql" {
        "a user": "nth(7)" => rows 1, pages 2 * A_ROW;
        "a pending registration": "nth(2000007)" => rows 1, pages 2 * A_ROW;
        "an unknown user": "nth(500000)" => rows 0, pages A_ROW;
    }
    "users/for_password_check.sql" {
        "a user": "nth(7)" => rows 1, pages 2 * A_ROW;
        "an unknown user": "nth(500000)" => rows 0, pages A_ROW;
    }
    "users/for_login.sql" {
        "from a known network": "'user7@example.com', '192.0.2.1'" =>
            rows 1, pages 2 * A_ROW, rows_discarded 2;
        "from an unused network": "'user7@example.com', '192.0.2.7'" => rows 1, pages 2 * A_ROW;
        "an unknown user": "'nobody7@example.com', '192.0.2.7'" => rows 1, pages 2 * A_ROW;
    }
    "users/get.sql" {
        "a user": "nth(7)" => rows 1, pages A_ROW;
        "an unknown user": "nth(500000)" => rows 0, pages A_ROW;
    }
    "users/register.sql" {
        "a new address":
            "nth(500000), 'nobody@example.com', hash(1), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 1, pages 3 * A_WRITE;
        "a known address":
            "nth(500000), 'user7@example.com', hash(1), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages A_ROW;
    }
    "users/set_disabled.sql" {
        // Ends three sessions.
        "an account": "nth(7), true" => rows 1, pages 4 * A_WRITE;
        "an unknown user": "nth(500000), true" => rows 0, pages A_ROW;
    }
    "users/set_email.sql" {
        "the present address": "nth(7), 'user7@example.com', hash(7), 'new@example.com', nth(7)" =>
            rows 1, pages 4 * A_WRITE;
        "another address": "nth(7), 'user8@example.com', hash(7), 'new@example.com', null" =>
            rows 0, pages A_ROW, rows_discarded 1;
    }
    "users/set_password.sql" {
        "the verified hash": "nth(7), hash(7), hash(70000), false, null" =>
            rows 1, pages 2 * A_WRITE, rows_discarded 3;
        "another hash": "nth(7), hash(8), hash(70000), false, null" =>
            rows 0, pages A_ROW, rows_discarded 2;
        "a reset by mail": "nth(7), hash(7), hash(70000), true, 'user7@example.com'" =>
            rows 1, pages 2 * A_WRITE;
        "a reset by an operator": "nth(7), null, hash(70000), true, null" =>
            rows 1, pages 2 * A_WRITE;
    }
}

const READS_ALL: &str = "scans a whole table";

/// The measured cost of a statement.
struct PlanStats {
    /// Whether the plan was generic.
    generic: bool,
    rows: u64,
    pages: u64,
    /// Rows that a filter removed.
    removed: u64,
    /// The most rows that were sorted.
    sorted: u64,
    /// The number of sequential scans.
    scans: u64,
    /// A short description of each node of the plan.
    plan: Vec<String>,
}

impl PlanStats {
    /// Returns the limits of the case that this cost exceeds.
    fn violations(&self, case: &Case) -> Vec<String> {
        let mut violations = Vec::new();
        if self.rows != case.rows {
            violations.push(format!("returns {} rows, not {}", self.rows, case.rows));
        }
        if self.pages > case.pages {
            violations.push(format!(
                "touches {} pages, more than {}",
                self.pages, case.pages
            ));
        }
        if self.removed > case.rows_discarded {
            violations.push(format!(
                "removes {} rows, more than {}",
                self.removed, case.rows_discarded
            ));
        }
        // An index provides the order, but a custom plan may prefer to sort the rows that it reads.
        let sorted = match self.generic {
            true => case.sorted,
            false => case.rows + case.rows_discarded,
        };
        if self.sorted > sorted {
            violations.push(format!("sorts {} rows, more than {sorted}", self.sorted));
        }
        // A scan in the plan may not have been executed; one in a cascade is not in the plan.
        let planned = self.plan.iter().any(|node| node.contains("Seq Scan"));
        if (self.scans > 0 || planned) && case.reads_all.is_empty() {
            violations.push(READS_ALL.to_owned());
        }
        violations
    }

    fn add_node(&mut self, node: &Value) {
        let kind = node["Node Type"].as_str().expect("a node");
        let of = node["Index Name"]
            .as_str()
            .or(node["Relation Name"].as_str());
        self.plan.push(match of {
            Some(of) => format!("{kind} of {of}"),
            None => kind.to_owned(),
        });
        // Both numbers are averages over the loops.
        let times = |node: &Value, what: &str| {
            let number = |what: &str| node[what].as_f64().unwrap_or(0.0);
            (number(what) * number("Actual Loops")).round() as u64
        };
        self.removed += times(node, "Rows Removed by Filter")
            + times(node, "Rows Removed by Join Filter")
            + times(node, "Rows Removed by Index Recheck");
        for child in node["Plans"].as_array().into_iter().flatten() {
            if kind.ends_with("Sort") {
                self.sorted = self.sorted.max(times(child, "Actual Rows"));
            }
            self.add_node(child);
        }
    }
}

/// Creates a database with the service's schema and these rows, by cloning the first one.
async fn create_filled_database() -> (Database, Client) {
    static TEMPLATE: OnceCell<Database> = OnceCell::const_new();
    let database = Database::clone_of(&TEMPLATE, async || {
        let database = Database::create_migrated().await;
        let sql = database.sql().await;
        sql.batch_execute(ROWS).await.expect("rows");
        sql.batch_execute("vacuum analyze")
            .await
            .expect("statistics");
        database
    })
    .await;
    let sql = database.sql().await;
    (database, sql)
}

/// Runs a statement twice in transactions that are rolled back: once to count the rows, once to
/// measure the cost.
async fn measure(sql: &Client, plan: &str, text: &str, given: &str, with: &str) -> PlanStats {
    let prepare = format!("deallocate all; set plan_cache_mode = {plan}; prepare s as {text}");
    sql.batch_execute(&prepare).await.expect(text);
    let execute = match with {
        "" => "execute s".to_owned(),
        with => format!("execute s({with})"),
    };
    let begin = format!("begin; {given}");

    sql.batch_execute(&begin).await.expect(given);
    let messages = sql.simple_query(&execute).await.expect(text);
    let Some(SimpleQueryMessage::CommandComplete(rows)) = messages.last() else {
        panic!("no result of {text}");
    };
    sql.batch_execute("rollback").await.expect("rollback");

    sql.batch_execute(&begin).await.expect(given);
    let before = counters(sql).await;
    // A trigger looks for the name of the table in the statement.
    let table = text.find("task_lists").map_or("", |_| "/* task_lists */");
    let explain = format!("explain (analyze, buffers, timing off, format json) {table} {execute}");
    let explained = row(sql, &explain).await;
    let after = counters(sql).await;
    sql.batch_execute("rollback").await.expect("rollback");

    let explained: Value = serde_json::from_str(&explained[0]).expect("JSON");
    let explained = &explained[0];
    // The planner also reads pages: both ends of an index, to correct its statistics.
    let planning = ["Shared Hit Blocks", "Shared Read Blocks"]
        .map(|kind| explained["Planning"][kind].as_u64().unwrap_or(0));
    let mut stats = PlanStats {
        generic: plan == PLANS[0],
        rows: *rows,
        pages: (after.pages - before.pages).saturating_sub(planning.iter().sum()),
        removed: 0,
        sorted: 0,
        scans: after.scans - before.scans,
        plan: Vec::new(),
    };
    stats.add_node(&explained["Plan"]);
    stats
}

/// The accesses of this transaction, without those to the system catalog.
struct Counters {
    pages: u64,
    scans: u64,
}

/// Reads the counters, which, unlike the plan, include triggers and cascades.
async fn counters(sql: &Client) -> Counters {
    let values = row(
        sql,
        "select sum(pg_stat_get_xact_blocks_fetched(oid)),
                sum(pg_stat_get_xact_numscans(oid)) filter (where relkind = 'r')
         from pg_class where oid >= 16384",
    )
    .await;
    let counter = |n: usize| values[n].parse().expect("a number");
    Counters {
        pages: counter(0),
        scans: counter(1),
    }
}

/// Returns the first row of a query.
async fn row(sql: &Client, query: &str) -> Vec<String> {
    let messages = sql.simple_query(query).await.expect(query);
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let row = row.expect("a row");
    let text = |n| row.get(n).expect("not null").to_owned();
    (0..row.len()).map(text).collect()
}

/// Returns every statement: its path under `sql/` and its text.
fn statements() -> Vec<(String, String)> {
    let mut files = files();
    files.retain(|(name, _)| !name.starts_with("migrations/"));
    files
}

fn text<'a>(statements: &'a [(String, String)], file: &str) -> &'a str {
    let found = statements.iter().find(|(name, _)| name == file);
    &found.unwrap_or_else(|| panic!("there is no sql/{file}")).1
}

#[test]
fn every_statement_has_cases() {
    let cases: BTreeSet<_> = CASES.iter().map(|case| case.file.to_owned()).collect();
    let files: BTreeSet<_> = statements().into_iter().map(|(name, _)| name).collect();
    let missing: Vec<_> = files.difference(&cases).collect();
    let obsolete: Vec<_> = cases.difference(&files).collect();
    assert!(missing.is_empty(), "no cases for {missing:?}");
    assert!(obsolete.is_empty(), "no files {obsolete:?}");
}

#[tokio::test]
async fn statements_read_little_more_than_they_return() {
    let (_database, sql) = create_filled_database().await;
    let statements = statements();
    let mut violations = Vec::new();
    for case in CASES {
        // Removes the row versions of the previous cases.
        sql.batch_execute(&format!("vacuum (index_cleanup on) {}", TABLES.join(", ")))
            .await
            .expect("vacuum");
        let text = text(&statements, case.file);
        for plan in PLANS {
            let stats = measure(&sql, plan, text, case.given, case.with).await;
            let what = format!("sql/{} ({}, {plan})", case.file, case.what);
            println!(
                "{what}: {} rows, {} pages, {} removed, {:?}",
                stats.rows, stats.pages, stats.removed, stats.plan
            );
            for violation in stats.violations(case) {
                violations.push(format!("{what} {violation}: {:?}", stats.plan));
            }
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[tokio::test]
async fn a_late_page_costs_no_more_than_the_first() {
    let (_database, sql) = create_filled_database().await;
    let statements = statements();
    for (file, with) in [
        (
            "tasks/list_newest.sql",
            "nth(7), null, null, AFTER, 51, 1048577",
        ),
        (
            "tasks/list_oldest.sql",
            "nth(7), null, null, AFTER, 51, 1048577",
        ),
        (
            "tasks/list_newest_batch.sql",
            "array[nth(7)], array[AFTER]::uuid[], array[51]",
        ),
    ] {
        let text = text(&statements, file);
        for plan in PLANS {
            let page = async |after: &str| {
                let with = with.replace("AFTER", after);
                let stats = measure(&sql, plan, text, "", &with).await;
                assert_eq!(stats.rows, 51, "sql/{file} after {after}");
                stats.pages
            };
            let first = page("null").await;
            for depth in (10_000..=90_000).step_by(10_000) {
                let pages = page(&format!("nth({depth} + 6)")).await;
                // Its start and end can be on other pages of the index.
                assert!(
                    pages <= first + 4,
                    "sql/{file} after {depth}: {pages} pages, the first has {first} ({plan})"
                );
            }
        }
    }
}

// Also verifies that the cases detect a missing index.
#[tokio::test]
async fn every_index_keeps_a_statement_within_its_limits() {
    let (_database, sql) = create_filled_database().await;
    let statements = statements();
    let indexes = row(
        &sql,
        "select string_agg(indexrelid::regclass::text, ' ')
         from pg_index i join pg_class c on c.oid = i.indrelid
         where c.relnamespace = 'public'::regnamespace and not i.indisunique
           -- Only the previous release uses it.
           and c.relname <> 'sign_in_failures'",
    )
    .await;
    'indexes: for index in indexes[0].split(' ') {
        for case in CASES {
            let text = text(&statements, case.file);
            let given = format!("drop index {index}; {}", case.given);
            let stats = measure(&sql, PLANS[0], text, &given, case.with).await;
            if !stats.violations(case).is_empty() {
                continue 'indexes;
            }
        }
        panic!("no statement needs {index}");
    }
}

#[tokio::test]
async fn detects_statements_that_read_too_much() {
    let (_database, sql) = create_filled_database().await;
    let statements = statements();
    let case = Case {
        rows: 10,
        pages: FIFTY_ONE,
        ..DEFAULT_CASE
    };
    for (rest, expected) in [
        ("order by user_id, id limit 10", None),
        ("order by user_id, id limit 9", Some("returns 9 rows")),
        ("order by user_id, id offset 900 limit 10", Some("touches ")),
        ("and title like '%plants%'", Some("removes 990 rows")),
        ("order by title limit 10", Some("sorts 1000 rows")),
        ("or user_id::text = $1::text limit 10", Some(READS_ALL)),
    ] {
        let text = format!("select title from tasks where user_id = $1 {rest}");
        for plan in PLANS {
            let stats = measure(&sql, plan, &text, "", "nth(7)").await;
            let violations = stats.violations(&case);
            let detected = match expected {
                Some(expected) => violations.iter().any(|found| found.starts_with(expected)),
                None => violations.is_empty(),
            };
            assert!(detected, "{text} ({plan}): {violations:?}");
        }
    }

    // The plan does not include a cascade to a table without an index.
    let given = "alter table idempotency_keys drop constraint idempotency_keys_pkey";
    let text = text(&statements, "users/delete.sql");
    for plan in PLANS {
        let stats = measure(&sql, plan, text, given, "nth(4000), hash(4000)").await;
        assert!(stats.violations(&case).contains(&READS_ALL.to_owned()));
    }
}
