//! The kinds of work, as requests for the service and as scripts for pgbench.

use std::io::Write;

use serde_json::json;

use crate::{Result, SECRET};

pub(crate) const USERS: u64 = 1_000;
pub(crate) const TASKS: u64 = 100 * USERS;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    List,
    Create,
    Update,
    Toggle,
    Delete,
    Mix,
}

impl Work {
    pub(crate) const ALL: [Work; 7] = [
        Work::Read,
        Work::List,
        Work::Create,
        Work::Update,
        Work::Toggle,
        Work::Delete,
        Work::Mix,
    ];

    /// The share of each kind in the mix, in percent; 80 are reads.
    pub(crate) const MIX: [(Work, u64); 5] = [
        (Work::Read, 60),
        (Work::List, 20),
        (Work::Create, 7),
        (Work::Update, 7),
        (Work::Toggle, 6),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Work::Read => "read one",
            Work::List => "list 20",
            Work::Create => "create",
            Work::Update => "update",
            Work::Toggle => "toggle",
            Work::Delete => "delete",
            Work::Mix => "80 % reads",
        }
    }

    /// Writes a request and returns the expected status.
    pub(crate) fn request(
        self,
        users: &[BenchUser],
        delete_range: u64,
        rng: &mut Rng,
        out: &mut Vec<u8>,
    ) -> u16 {
        let task = rng.below(TASKS);
        let one = format!("/{}", id(task));
        let user = &users[owner(task)];
        match self {
            Work::Read => user.request(out, "GET", &one, None, 200),
            Work::List => user.request(out, "GET", "?limit=20", None, 200),
            Work::Create => {
                let body = r#"{"title": "Water the plants", "description": "All but the cactus"}"#;
                user.request(out, "POST", "", Some(body), 201)
            }
            Work::Update => {
                let body = format!(r#"{{"title": "Changed {}"}}"#, rng.below(1_000_000));
                user.request(out, "PATCH", &one, Some(&body), 200)
            }
            Work::Toggle => user.request(out, "PATCH", &format!("{one}/complete"), None, 200),
            Work::Delete => {
                let victim = delete_range + rng.connection * rng.share + rng.count;
                rng.count += 1;
                users[owner(victim)].request(out, "DELETE", &format!("/{}", id(victim)), None, 204)
            }
            Work::Mix => {
                let mut point = rng.below(100);
                for (work, percent) in Self::MIX {
                    if point < percent {
                        return work.request(users, delete_range, rng, out);
                    }
                    point -= percent;
                }
                unreachable!("the percentages add up to 100")
            }
        }
    }

    /// Returns the script for pgbench: the plain statement on one row, or for a list on its rows. It sets
    /// `revision`, or names `task_lists`, so that the triggers for earlier releases do not fire.
    pub(crate) fn script(self, delete_range: u64, share: u64) -> Result<String> {
        let task = format!("\\set n {OFFSET} + random(0, {})\n", TASKS - 1);
        let owner = format!("\\set u {OFFSET} + :n % {USERS}\n");
        // Ids are built from text because pgbench's variables have at most 64 bits.
        let (user, id) = (sql_id(":u"), sql_id(":n"));
        let columns = "id, user_id, title, description, completed, created_at, updated_at";
        let one = format!("where user_id = {user} and id = {id}");
        let update = |change: &str| {
            let times = "updated_at = clock_timestamp(), revision = revision + 1";
            format!("update tasks set {change}, {times} {one} returning {columns};\n")
        };
        Ok(match self {
            Work::Read => format!("{task}{owner}select {columns} from tasks {one};\n"),
            Work::List => format!(
                "{task}{owner}select {columns} from tasks where user_id = {user} order by id desc limit 20;\n"
            ),
            // A range of ids for each client, so that no id is used twice.
            Work::Create => format!(
                "\\set n {OFFSET} + random(100000000000000, 899999999999999)\n{owner}\
                 insert into tasks ({columns}, revision) values ({id}, {user}, 'Water the plants', \
                 'All but the cactus', false, clock_timestamp(), clock_timestamp(), 1);\n"
            ),
            Work::Update => {
                let change = update("title = 'Changed ' || :t");
                format!("{task}{owner}\\set t random(0, 999999)\n{change}")
            }
            Work::Toggle => task + &owner + &update("completed = not completed"),
            Work::Delete => format!(
                "\\set i :i + 1\n\\set n {OFFSET} + {delete_range} + :client_id * {share} + :i\n{owner}\
                 delete /* task_lists */ from tasks {one};\n"
            ),
            Work::Mix => return Err("the mix is several scripts".into()),
        })
    }
}

/// Ids are this prefix (version 7, a fixed time) and a number of 16 digits, which fits into 64 bits.
pub(crate) const ID_START: &str = "0190000000007000";
pub(crate) const OFFSET: u64 = 8_000_000_000_000_000;

/// Returns the id of the user or task with the number `n`.
pub(crate) fn id(n: u64) -> String {
    let digits = (OFFSET + n).to_string();
    format!("01900000-0000-7000-{}-{}", &digits[..4], &digits[4..])
}

/// Returns this id as SQL, for an expression that includes the offset.
pub(crate) fn sql_id(n: &str) -> String {
    format!("('{ID_START}' || {n})::uuid")
}

/// Returns the owner of a task. Consecutive tasks belong to different users, as in production, so that a
/// list of 20 reads 20 pages.
pub(crate) fn owner(task: u64) -> usize {
    (task % USERS) as usize
}

pub(crate) struct BenchUser {
    id: String,
    token: String,
}

impl BenchUser {
    /// Returns the user number `n` with a token like the service's.
    pub(crate) fn new(n: u64) -> Result<Self> {
        let id = id(n);
        let now = jiff::Timestamp::now().as_second();
        let claims = json!({
            "user_id": id, "sub": id, "email": email(n), "sid": id,
            "iat": now, "exp": now + 86_400,
        });
        let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
        let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)?;
        Ok(Self { id, token })
    }

    pub(crate) fn request(
        &self,
        out: &mut Vec<u8>,
        method: &str,
        rest: &str,
        body: Option<&str>,
        status: u16,
    ) -> u16 {
        let Self { id, token } = self;
        // Writing to a Vec cannot fail.
        let _ = write!(
            out,
            "{method} /api/v1/{id}/tasks{rest} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n"
        );
        write_body(out, body);
        status
    }
}

pub(crate) fn write_body(out: &mut Vec<u8>, body: Option<&str>) {
    let _ = match body {
        None => write!(out, "\r\n"),
        Some(body) => write!(
            out,
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ),
    };
}

pub(crate) fn email(n: u64) -> String {
    format!("user{n}@bench.example")
}

/// The state from which one connection generates its requests.
pub(crate) struct Rng {
    pub(crate) connection: u64,
    /// The number of tasks that each connection can delete.
    pub(crate) share: u64,
    pub(crate) count: u64,
    pub(crate) state: u64,
}

impl Rng {
    /// Xorshift, which is random enough to choose rows.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % bound
    }
}

/// Returns the statement that creates all users, each with a session.
pub(crate) fn insert_users(password_hash: &str) -> String {
    let id = sql_id(&format!("({OFFSET} + n)"));
    let last = USERS - 1;
    format!(
        "with users_created as (
            insert into users (id, email, password_hash, created_at, updated_at)
            select {id}, 'user' || n || '@bench.example', '{password_hash}', now(), now()
            from generate_series(0, {last}) n
            returning id
         )
         insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at, expires_at)
         select id, id, 1, now(), now(), now(), now() + interval '30 days' from users_created"
    )
}

/// Returns the statement that creates tasks from number `first` on, distributed over all users.
pub(crate) fn insert_tasks(first: u64, count: u64) -> String {
    insert(&format!("{OFFSET} + n % {USERS}"), first, count)
}

/// Returns the query that counts the remaining tasks from number `first` on.
pub(crate) fn count_remaining(first: u64) -> String {
    let first = sql_id(&(OFFSET + first).to_string());
    format!("select count(*) from tasks where title = 'Delete me' and id >= {first}")
}

/// Returns the statement that creates tasks of one user.
pub(crate) fn insert_tasks_of(user: usize, first: u64, count: u64) -> String {
    insert(&format!("{OFFSET} + {user}"), first, count)
}

pub(crate) fn insert(user: &str, first: u64, count: u64) -> String {
    let title = if first >= 1_000_000_000 {
        "'Delete me'"
    } else {
        "'Task ' || n"
    };
    let (user, id) = (
        sql_id(&format!("({user})")),
        sql_id(&format!("({OFFSET} + n)")),
    );
    format!(
        "insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
         select {user}, {id}, {title}, 'Something that is to be done before long',
                n % 3 = 0, now(), now(), 1
         from generate_series({first}::bigint, {}) n",
        first + count - 1
    )
}
