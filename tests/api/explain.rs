//! What the statements under `sql/` cost where many rows are: each touches what it gives back and
//! little more, whichever plan PostgreSQL makes of it.

use std::collections::BTreeSet;

use serde_json::Value;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::harness::Server;
use crate::sql::files;

/// 100 people with 1,000 tasks each, who all write at the same time: on a page of the table hardly
/// two tasks are of the same person. The n-th user, task and session has the id `nth(n)`; user 7
/// has the tasks 6, 106 to 99906, and user 5000 a hundred sessions. Nothing is due to be swept.
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

insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
select nth(1 + n % 100), nth(n),
       case n / 100 % 100 when 3 then 'water the plants ' else 'sweep the floor ' end || n,
       repeat('and then ', 8) || 'rest', n / 100 % 40 = 0, moment(n), moment(n)
from generate_series(0, 99999) n;

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

-- User 8 has as many as an account can have.
insert into login_networks (user_id, network, last_used_at)
select nth(n), '192.0.2.' || network, now() - interval '1 day' - network * interval '1 minute'
from generate_series(1, 5000) n, generate_series(1, case n when 8 then 100 else 2 end) network;

insert into idempotency_keys (user_id, key, task_id, title, description, completed, created_at)
select nth(1 + n % 5000), 'key ' || n, nth(n), 'sweep the floor', null, false,
       now() - n * interval '8 seconds'
from generate_series(1, 10000) n";

/// All of them.
const TABLES: [&str; 7] = [
    "users",
    "tasks",
    "sessions",
    "revocations",
    "login_failures",
    "login_networks",
    "idempotency_keys",
];

/// PostgreSQL plans a prepared statement for the parameters at hand at first, and after five times
/// for any parameters if that looks no dearer. A connection may come to run either.
const PLANS: [&str; 2] = ["force_generic_plan", "force_custom_plan"];

/// A statement at one of its tasks, and what that may cost.
struct Case {
    /// The statement's path below `sql/`.
    file: &'static str,
    /// What is asked of it.
    what: &'static str,
    /// The parameters, as a list of SQL expressions.
    with: &'static str,
    /// Statements that make the case, in the same transaction.
    given: &'static str,
    /// Rows that it gives back, or changes where it gives none back.
    rows: u64,
    /// Pages of our tables and indexes that it may touch, each as often as it does; those that its
    /// triggers and cascades touch count.
    pages: u64,
    /// Rows that it may read and not give back.
    rows_discarded: u64,
    /// Rows that it may sort whatever its parameters are: a few are sorted as fast as read in order.
    sorted: u64,
    /// Why it may read a table from its beginning, if it may.
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

/// Down an index and into the table: up to 4 pages.
const A_ROW: u64 = 8;
/// A row made or changed in all its indexes, or deleted, with the row that a foreign key asks for
/// or a trigger writes: 9 to 16 pages.
const A_WRITE: u64 = 30;
/// Rows that lie far apart cost a page each, besides those of the index: 3 to 6.
const FIFTY_ONE: u64 = 70;
/// The same for all tasks of a user, where the index has up to 26.
const THOUSAND: u64 = 1100;
/// A batch of a sweep. Each row is found, locked and deleted.
const A_BATCH: u64 = 500 * 6;

// About twice what is measured, unless the rows that are read account for it.
cases! {
    "idempotency_keys/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        "twenty are due": "" => rows 20, pages 130,
            given "update idempotency_keys set created_at = now() - interval '2 days'
                   where user_id between nth(11) and nth(20)";
        "thousands are due": "" => rows 500, pages A_BATCH,
            given "update idempotency_keys set created_at = now() - interval '2 days'
                   where user_id <= nth(2000)";
    }
    "login_failures/clear.sql" {
        "of somebody": "nth(7)" => rows 3, pages A_WRITE;
        "of nobody": "nth(500000)" => rows 0, pages A_ROW;
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
        "the first": "'new@example.com', '192.0.2.9'" => rows 1, pages 2 * A_WRITE;
        "one more at an unknown address": "'nobody7@example.com', '192.0.2.7'" =>
            rows 1, pages 2 * A_WRITE;
        "one more from elsewhere": "'user7@example.com', '192.0.2.7'" => rows 1, pages 2 * A_WRITE;
        "one more from a known network": "'user7@example.com', '192.0.2.2'" =>
            rows 1, pages 2 * A_WRITE;
        "one more while signed in": "nth(7)::text, 'session'" => rows 1, pages A_WRITE;
        "one while blocked": "'user7@example.com', '192.0.2.7'" =>
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
    "revocations/since.sql" {
        "for the first time": "null, null" => rows 10_001, pages 230,
            reads_all "every row is asked for";
        "nothing was revoked": "200, pg_postmaster_start_time()" => rows 1, pages A_ROW;
        "five were revoked": "200, pg_postmaster_start_time()" => rows 6, pages A_ROW,
            given "update revocations set xid = '300' where session_id <= nth(1000005)";
        "five came out of a dump": "200, pg_postmaster_start_time()" => rows 1, pages A_ROW,
            given "update revocations set xid = '9000000000000' where session_id <= nth(1000005)";
        "from another server": "200, now()" => rows 10_001, pages 230,
            reads_all "every row is asked for";
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
        "one's own": "nth(7), nth(6), 0" => rows 1, pages A_WRITE;
        "somebody else's": "nth(7), nth(7), 0" => rows 0, pages A_ROW;
    }
    "sessions/end_by_refresh_token.sql" {
        "alive": "nth(6), 3" => rows 1, pages A_WRITE;
        "gone": "nth(500000), 3" => rows 0, pages A_ROW;
    }
    "sessions/end_others.sql" {
        "one other": "nth(7), nth(6)" => rows 1, pages A_WRITE, rows_discarded 1;
        // Three pages for a session, nine for its revocation.
        "as many others as there can be": "nth(5000), nth(65)" => rows 99, pages 99 * 20, rows_discarded 1;
    }
    "sessions/end_reused.sql" {
        "a token that was used": "nth(6), 2" => rows 1, pages A_WRITE;
        "one that was not": "nth(6), 3" => rows 0, pages A_ROW, rows_discarded 1;
        "gone": "nth(500000), 2" => rows 0, pages A_ROW;
    }
    "sessions/list.sql" {
        "two": "nth(7)" => rows 2, pages A_ROW, sorted 2;
        "a hundred": "nth(5000)" => rows 100, pages 130, sorted 100;
    }
    "sessions/refresh.sql" {
        // A new version of the row, which goes into three indexes.
        "the newest token": "nth(6), 3, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 1, pages 60, rows_discarded 3;
        "within the hour": "nth(6), 3, 1e6, 1e6, 1e7, '192.0.2.1'" =>
            rows 1, pages 40, rows_discarded 1,
            given "update login_networks set last_used_at = now() where user_id = nth(7)";
        // All networks of the user are looked at for the oldest.
        "from a network too many": "nth(7), 3, 1e6, 1e6, 1e7, '192.0.2.200'" =>
            rows 1, pages 90, rows_discarded 99;
        "the one before": "nth(6), 2, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 1, pages 60, rows_discarded 3;
        "an older one": "nth(6), 1, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 0, pages A_ROW, rows_discarded 1;
        "gone": "nth(500000), 1, 1e6, 1e6, 1e7, '192.0.2.1'" => rows 0, pages A_ROW;
    }
    "sessions/renew.sql" {
        "one other": "nth(7), nth(6), 1e6, 1e7" => rows 1, pages 3 * A_WRITE, rows_discarded 1;
        "the session is over": "nth(7), nth(500000), 1e6, 1e7" => rows 1, pages 2 * A_WRITE;
        "none to keep": "nth(7), null, 1e6, 1e7" => rows 1, pages 2 * A_WRITE;
    }
    "sessions/login.sql" {
        "after wrong attempts":
            "nth(7), hash(7), hash(7), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 1, pages 3 * A_WRITE, rows_discarded 3;
        "with an old hash":
            "nth(7), hash(7), hash(70000), nth(500000), 1e6, 'Firefox', '192.0.2.1'" =>
            rows 1, pages 4 * A_WRITE, rows_discarded 5;
        "from a network too many":
            "nth(8), hash(8), hash(8), nth(500000), 1e6, 'Firefox', '192.0.2.200'" =>
            rows 1, pages 4 * A_WRITE, rows_discarded 99;
        // The hundred are read and put in order.
        "beyond a hundred sessions":
            "nth(5000), hash(5000), hash(5000), nth(500000), 1e6, 'Firefox', '192.0.2.1'" =>
            rows 1, pages 130 + 4 * A_WRITE, rows_discarded 3;
        "while blocked":
            "nth(7), hash(7), hash(7), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages 2 * A_ROW, rows_discarded 1,
            given "update login_failures set blocked_until = now() + interval '1 hour'
                   where account = 'user7@example.com' and network = '*'";
        "the password was changed":
            "nth(7), hash(8), hash(8), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages A_ROW, rows_discarded 1;
        "nobody": "nth(500000), hash(8), hash(8), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages A_ROW;
    }
    "sessions/purge.sql" {
        "nothing is due": "" => rows 0, pages A_ROW;
        // Here and below, the trigger wants each row as it was: one page more.
        "twenty are due": "" => rows 20, pages 170,
            given "update sessions set expires_at = now() - interval '2 days'
                   where id between nth(11) and nth(30)";
        "thousands are due": "" => rows 500, pages A_BATCH + 1000,
            given "update sessions set expires_at = now() - interval '2 days'
                   where id <= nth(3000)";
    }
    "tasks/count.sql" {
        // The index alone.
        "all": "nth(7), null, null" => rows 1, pages 30;
        // A filter looks at all tasks of the user, and at nobody else's.
        "the completed": "nth(7), true, null" => rows 1, pages THOUSAND, rows_discarded 975;
        "a search": "nth(7), null, 'PLANTS'" => rows 1, pages THOUSAND, rows_discarded 990;
    }
    "tasks/create.sql" {
        "a task": "nth(7), nth(500000), 'dust the shelf', null, false, moment(500000)" =>
            rows 1, pages A_WRITE;
    }
    "tasks/create_idempotent.sql" {
        "a new key": "nth(7), nth(500000), 'dust', null, false, moment(500000), 'new'" =>
            rows 1, pages 2 * A_WRITE;
        "a known key": "nth(7), nth(500000), 'dust', null, false, moment(500000), 'key 6'" =>
            rows 1, pages A_WRITE, rows_discarded 1;
        "an old key": "nth(7), nth(500000), 'dust', null, false, moment(500000), 'key 6'" =>
            rows 1, pages 2 * A_WRITE,
            given "update idempotency_keys set created_at = now() - interval '2 days'
                   where user_id = nth(7)";
    }
    "tasks/delete.sql" {
        "any version": "nth(7), nth(50006), null, true" => rows 1, pages 2 * A_ROW;
        "this version": "nth(7), nth(50006), array[moment(1), moment(50006)], true" =>
            rows 1, pages 2 * A_ROW;
        "another version": "nth(7), nth(50006), array[moment(1)], true" =>
            rows 1, pages 2 * A_ROW, rows_discarded 1;
        "any but another": "nth(7), nth(50006), array[moment(1)], false" =>
            rows 1, pages 2 * A_ROW;
        "somebody else's": "nth(7), nth(50007), array[moment(50007)], true" =>
            rows 1, pages 2 * A_ROW;
    }
    "tasks/delete_completed.sql" {
        // Looks at all tasks of the user, and at nobody else's.
        "25 of 1,000": "nth(7)" => rows 25, pages THOUSAND + 100, rows_discarded 975;
        "no tasks": "nth(4000)" => rows 0, pages A_ROW;
    }
    "tasks/get_batch.sql" {
        "a task": "array[nth(7)], array[nth(50006)]" => rows 1, pages A_ROW;
        "none": "array[nth(7)], array[nth(500000)]" => rows 0, pages A_ROW;
        "somebody else's": "array[nth(7)], array[nth(50007)]" => rows 0, pages A_ROW;
        "three at once": "array[nth(7), nth(8), nth(9)], array[nth(50006), nth(50006), nth(50008)]"
            => rows 2, pages 3 * A_ROW;
    }
    "tasks/list_newest.sql" {
        "the first page": "nth(7), null, null, null, 51" => rows 51, pages FIFTY_ONE;
        "one amid": "nth(7), null, null, nth(50006), 51" => rows 51, pages FIFTY_ONE;
        "the last": "nth(7), null, null, nth(3006), 51" => rows 30, pages FIFTY_ONE;
        "all": "nth(7), null, null, null, 1001" => rows 1000, pages THOUSAND;
        "no tasks": "nth(4000), null, null, null, 1001" => rows 0, pages A_ROW;
        "the first open": "nth(7), false, null, null, 51" => rows 51, pages FIFTY_ONE, rows_discarded 1;
        // A filter that few match looks at all tasks of the user, and at nobody else's.
        "the completed": "nth(7), true, null, null, 51" => rows 25, pages THOUSAND, rows_discarded 975;
        "a search": "nth(7), null, 'PLANTS', null, 51" => rows 10, pages THOUSAND, rows_discarded 990;
    }
    "tasks/list_oldest.sql" {
        "the first page": "nth(7), null, null, null, 51" => rows 51, pages FIFTY_ONE;
        "one amid": "nth(7), null, null, nth(50006), 51" => rows 51, pages FIFTY_ONE;
        "the last": "nth(7), null, null, nth(96906), 51" => rows 30, pages FIFTY_ONE;
        "all": "nth(7), null, null, null, 1001" => rows 1000, pages THOUSAND;
        "no tasks": "nth(4000), null, null, null, 1001" => rows 0, pages A_ROW;
        "the first open": "nth(7), false, null, null, 51" => rows 51, pages FIFTY_ONE, rows_discarded 2;
        // As above.
        "the completed": "nth(7), true, null, null, 51" => rows 25, pages THOUSAND, rows_discarded 975;
        "a search": "nth(7), null, 'PLANTS', null, 51" => rows 10, pages THOUSAND, rows_discarded 990;
    }
    "tasks/list_newest_batch.sql" {
        "the first page": "array[nth(7)], array[null]::uuid[], array[51]" => rows 51, pages FIFTY_ONE;
        "one amid": "array[nth(7)], array[nth(50006)], array[51]" => rows 51, pages FIFTY_ONE;
        "the last": "array[nth(7)], array[nth(3006)], array[51]" => rows 30, pages FIFTY_ONE;
        "no tasks": "array[nth(4000)], array[null]::uuid[], array[51]" => rows 0, pages A_ROW;
        "three at once":
            "array[nth(7), nth(8), nth(9)], array[null, nth(50007), null]::uuid[], array[51, 51, 1]"
            => rows 103, pages 2 * FIFTY_ONE + A_ROW;
    }
    "tasks/update.sql" {
        "any version": "nth(7), nth(50006), null, false, null, true, null, null, true" =>
            rows 1, pages A_WRITE;
        "this version":
            "nth(7), nth(50006), 'dust', true, null, false, true, array[moment(1), moment(50006)], true" =>
            rows 1, pages A_WRITE;
        "another version":
            "nth(7), nth(50006), 'dust', true, null, false, true, array[moment(1)], true" =>
            rows 1, pages 2 * A_ROW, rows_discarded 1;
        "any but another":
            "nth(7), nth(50006), 'dust', true, null, false, true, array[moment(1)], false" =>
            rows 1, pages A_WRITE;
        "somebody else's":
            "nth(7), nth(50007), 'dust', true, null, false, true, array[moment(50007)], true" =>
            rows 1, pages 2 * A_ROW;
    }
    "users/delete.sql" {
        // Two pages a task: one to find it, one to delete it.
        "with 1,000 tasks": "nth(7), hash(7)" => rows 1, pages 3000, rows_discarded 1;
        // The account, a session with its revocation, two keys.
        "without tasks": "nth(4000), hash(4000)" => rows 1, pages 3 * A_WRITE;
        "the password was changed": "nth(7), hash(8)" => rows 0, pages A_ROW, rows_discarded 2;
    }
    "users/for_password_check.sql" {
        "somebody": "nth(7)" => rows 1, pages 2 * A_ROW;
        "nobody": "nth(500000)" => rows 0, pages A_ROW;
    }
    "users/for_login.sql" {
        "from a known network": "'user7@example.com', '192.0.2.1'" =>
            rows 1, pages 2 * A_ROW, rows_discarded 2;
        "from elsewhere": "'user7@example.com', '192.0.2.7'" => rows 1, pages 2 * A_ROW;
        "nobody": "'nobody7@example.com', '192.0.2.7'" => rows 1, pages 2 * A_ROW;
    }
    "users/get.sql" {
        "somebody": "nth(7)" => rows 1, pages A_ROW;
        "nobody": "nth(500000)" => rows 0, pages A_ROW;
    }
    "users/register.sql" {
        "a new address":
            "nth(500000), 'nobody@example.com', hash(1), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 1, pages 3 * A_WRITE;
        "a known address":
            "nth(500000), 'user7@example.com', hash(1), nth(500000), 1e6, 'Firefox', '192.0.2.7'" =>
            rows 0, pages A_ROW;
    }
    "users/set_password.sql" {
        "as verified": "nth(7), hash(7), hash(70000)" => rows 1, pages 2 * A_WRITE, rows_discarded 1;
        "changed meanwhile": "nth(7), hash(8), hash(70000)" => rows 0, pages A_ROW, rows_discarded 2;
    }
}

const READS_ALL: &str = "reads a table from its beginning";

/// What a statement did.
struct PlanStats {
    /// Whether the plan was for any parameters.
    generic: bool,
    rows: u64,
    pages: u64,
    /// Rows that a filter removed.
    removed: u64,
    /// The most rows that were sorted.
    sorted: u64,
    /// How often a table was read from its beginning.
    scans: u64,
    /// The plan, a word or two for each node.
    plan: Vec<String>,
}

impl PlanStats {
    /// Where this is more than the case allows.
    fn complaints(&self, case: &Case) -> Vec<String> {
        let mut complaints = Vec::new();
        if self.rows != case.rows {
            complaints.push(format!("gives {} rows, not {}", self.rows, case.rows));
        }
        if self.pages > case.pages {
            complaints.push(format!(
                "touches {} pages, more than {}",
                self.pages, case.pages
            ));
        }
        if self.removed > case.rows_discarded {
            complaints.push(format!(
                "removes {} rows, more than {}",
                self.removed, case.rows_discarded
            ));
        }
        // An index has the order. Where it is known how few rows that spares, to put in order what
        // is given back anyway may be cheaper.
        let sorted = match self.generic {
            true => case.sorted,
            false => case.rows + case.rows_discarded,
        };
        if self.sorted > sorted {
            complaints.push(format!("sorts {} rows, more than {sorted}", self.sorted));
        }
        // A scan may stand in the plan and not be run this time; one in a cascade is in no plan.
        let planned = self.plan.iter().any(|node| node.contains("Seq Scan"));
        if (self.scans > 0 || planned) && case.reads_all.is_empty() {
            complaints.push(READS_ALL.to_owned());
        }
        complaints
    }

    fn look_at(&mut self, node: &Value) {
        let kind = node["Node Type"].as_str().expect("a node");
        let of = node["Index Name"]
            .as_str()
            .or(node["Relation Name"].as_str());
        self.plan.push(match of {
            Some(of) => format!("{kind} of {of}"),
            None => kind.to_owned(),
        });
        // Both numbers are means over the loops.
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
            self.look_at(child);
        }
    }
}

/// A database of the usual schema with these rows.
async fn filled() -> (Server, Client) {
    let server = Server::start().await;
    let sql = server.sql().await;
    sql.batch_execute(ROWS).await.expect("rows");
    sql.batch_execute("vacuum analyze")
        .await
        .expect("statistics");
    (server, sql)
}

/// Runs a statement twice, each time in a transaction that is rolled back: once for what it gives,
/// once for what it reads.
async fn read(sql: &Client, plan: &str, text: &str, given: &str, with: &str) -> PlanStats {
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
        panic!("no end of {text}");
    };
    sql.batch_execute("rollback").await.expect("rollback");

    sql.batch_execute(&begin).await.expect(given);
    let before = touched(sql).await;
    let explain = format!("explain (analyze, buffers, timing off, format json) {execute}");
    let explained = row(sql, &explain).await;
    let after = touched(sql).await;
    sql.batch_execute("rollback").await.expect("rollback");

    let explained: Value = serde_json::from_str(&explained[0]).expect("JSON");
    let explained = &explained[0];
    // The planner reads, too: the ends of an index tell it how far its statistics have been left
    // behind.
    let planning = ["Shared Hit Blocks", "Shared Read Blocks"]
        .map(|kind| explained["Planning"][kind].as_u64().unwrap_or(0));
    let mut reading = PlanStats {
        generic: plan == PLANS[0],
        rows: *rows,
        pages: (after.pages - before.pages).saturating_sub(planning.iter().sum()),
        removed: 0,
        sorted: 0,
        scans: after.scans - before.scans,
        plan: Vec::new(),
    };
    reading.look_at(&explained["Plan"]);
    reading
}

/// What this transaction has touched of all that is not PostgreSQL's own.
struct Touched {
    pages: u64,
    scans: u64,
}

/// By the counters rather than the plan, which says nothing of triggers and cascades, and sums up
/// only what its first node waits for.
async fn touched(sql: &Client) -> Touched {
    let counters = row(
        sql,
        "select sum(pg_stat_get_xact_blocks_fetched(oid)),
                sum(pg_stat_get_xact_numscans(oid)) filter (where relkind = 'r')
         from pg_class where oid >= 16384",
    )
    .await;
    let counter = |n: usize| counters[n].parse().expect("a number");
    Touched {
        pages: counter(0),
        scans: counter(1),
    }
}

/// The first row of what a query gives.
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

/// Every statement: its path below `sql/`, and its text.
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
fn every_statement_says_what_it_may_read() {
    let cases: BTreeSet<_> = CASES.iter().map(|case| case.file.to_owned()).collect();
    let files: BTreeSet<_> = statements().into_iter().map(|(name, _)| name).collect();
    let silent: Vec<_> = files.difference(&cases).collect();
    let gone: Vec<_> = cases.difference(&files).collect();
    assert!(silent.is_empty(), "no case has {silent:?}");
    assert!(gone.is_empty(), "there are no files {gone:?}");
}

#[tokio::test]
async fn a_statement_reads_what_it_gives_back_and_little_more() {
    let (_server, sql) = filled().await;
    let statements = statements();
    let mut complaints = Vec::new();
    for case in CASES {
        // The cases before have left row versions that nobody wants.
        sql.batch_execute(&format!("vacuum (index_cleanup on) {}", TABLES.join(", ")))
            .await
            .expect("vacuum");
        let text = text(&statements, case.file);
        for plan in PLANS {
            let reading = read(&sql, plan, text, case.given, case.with).await;
            let what = format!("sql/{} ({}, {plan})", case.file, case.what);
            println!(
                "{what}: {} rows, {} pages, {} removed, {:?}",
                reading.rows, reading.pages, reading.removed, reading.plan
            );
            for complaint in reading.complaints(case) {
                complaints.push(format!("{what} {complaint}: {:?}", reading.plan));
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[tokio::test]
async fn a_page_deep_in_a_list_costs_no_more_than_the_first() {
    let (_server, sql) = filled().await;
    let statements = statements();
    for (file, with) in [
        ("tasks/list_newest.sql", "nth(7), null, null, AFTER, 51"),
        ("tasks/list_oldest.sql", "nth(7), null, null, AFTER, 51"),
        (
            "tasks/list_newest_batch.sql",
            "array[nth(7)], array[AFTER]::uuid[], array[51]",
        ),
    ] {
        let text = text(&statements, file);
        for plan in PLANS {
            let page = async |after: &str| {
                let with = with.replace("AFTER", after);
                let reading = read(&sql, plan, text, "", &with).await;
                assert_eq!(reading.rows, 51, "sql/{file} after {after}");
                reading.pages
            };
            let first = page("null").await;
            for depth in (10_000..=90_000).step_by(10_000) {
                let pages = page(&format!("nth({depth} + 6)")).await;
                // It may begin and end elsewhere on the pages of the index.
                assert!(
                    pages <= first + 4,
                    "sql/{file} after {depth}: {pages} pages, the first has {first} ({plan})"
                );
            }
        }
    }
}

// An index costs writes, so it has to be of use; and the cases find what they are there for.
#[tokio::test]
async fn every_index_saves_some_statement_from_reading_a_whole_table() {
    let (_server, sql) = filled().await;
    let statements = statements();
    let indexes = row(
        &sql,
        "select string_agg(indexrelid::regclass::text, ' ')
         from pg_index i join pg_class c on c.oid = i.indrelid
         where c.relnamespace = 'public'::regnamespace and not i.indisunique
           -- For the previous version of the service alone.
           and c.relname <> 'sign_in_failures'",
    )
    .await;
    'indexes: for index in indexes[0].split(' ') {
        for case in CASES {
            let text = text(&statements, case.file);
            let given = format!("drop index {index}; {}", case.given);
            let reading = read(&sql, PLANS[0], text, &given, case.with).await;
            if reading.complaints(case).contains(&READS_ALL.to_owned()) {
                continue 'indexes;
            }
        }
        panic!("no statement needs {index}");
    }
}

#[tokio::test]
async fn a_statement_that_reads_too_much_is_noticed() {
    let (_server, sql) = filled().await;
    let statements = statements();
    let case = Case {
        rows: 10,
        pages: FIFTY_ONE,
        ..DEFAULT_CASE
    };
    for (rest, expected) in [
        ("order by user_id, id limit 10", None),
        ("order by user_id, id limit 9", Some("gives 9 rows")),
        ("order by user_id, id offset 900 limit 10", Some("touches ")),
        ("and title like '%plants%'", Some("removes 990 rows")),
        ("order by title limit 10", Some("sorts 1000 rows")),
        ("or user_id::text = $1::text limit 10", Some(READS_ALL)),
    ] {
        let text = format!("select title from tasks where user_id = $1 {rest}");
        for plan in PLANS {
            let reading = read(&sql, plan, &text, "", "nth(7)").await;
            let complaints = reading.complaints(&case);
            let noticed = match expected {
                Some(expected) => complaints.iter().any(|found| found.starts_with(expected)),
                None => complaints.is_empty(),
            };
            assert!(noticed, "{text} ({plan}): {complaints:?}");
        }
    }

    // A cascade to a table that has no index for it, which no plan shows.
    let given = "alter table idempotency_keys drop constraint idempotency_keys_pkey";
    let text = text(&statements, "users/delete.sql");
    for plan in PLANS {
        let reading = read(&sql, plan, text, given, "nth(4000), hash(4000)").await;
        assert!(reading.complaints(&case).contains(&READS_ALL.to_owned()));
    }
}
