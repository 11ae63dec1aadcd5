//! The users and their tasks.

use std::{fmt::Display, io::Write, net::SocketAddr};

use serde_json::{Value, json};

use crate::{
    Result, SECRET,
    client::{fetch, header},
};

pub(crate) const USERS: u64 = 1_000;
pub(crate) const TASKS: u64 = 100 * USERS;

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
    /// The entity tag of the user's list, and a cursor after its oldest change.
    pub(crate) list_tag: String,
    cursor: String,
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
        Ok(Self {
            id,
            token,
            list_tag: String::new(),
            cursor: String::new(),
        })
    }

    /// Reads the tag and the cursor. They stay empty with an earlier release that has no such thing,
    /// whose requests then fail.
    pub(crate) fn read_list_state(&mut self, address: SocketAddr) -> Result<()> {
        let get = |path: &str| {
            let mut request = Vec::new();
            self.write(&mut request, "GET", path, "", None);
            Ok::<_, crate::Error>(fetch(address, &request)?.1)
        };
        let (list, changes) = (get("tasks?limit=20")?, get("changes?limit=1")?);
        let (_, changes) = changes.split_once("\r\n\r\n").unwrap_or_default();
        let changes: Value = serde_json::from_str(changes).unwrap_or_default();
        self.list_tag = header(&list, "etag").unwrap_or_default().to_owned();
        self.cursor = changes["cursor"].as_str().unwrap_or_default().to_owned();
        Ok(())
    }

    pub(crate) fn request(
        &self,
        out: &mut Vec<u8>,
        method: &str,
        rest: &str,
        body: Option<&str>,
        status: u16,
    ) -> u16 {
        self.write(out, method, format_args!("tasks{rest}"), "", body);
        status
    }

    pub(crate) fn request_changes(&self, out: &mut Vec<u8>) -> u16 {
        let path = format_args!("changes?since={}&limit=20", self.cursor);
        self.write(out, "GET", path, "", None);
        200
    }

    /// Writes a request. Each of the `headers` ends with a line end.
    pub(crate) fn write(
        &self,
        out: &mut Vec<u8>,
        method: &str,
        path: impl Display,
        headers: impl Display,
        body: Option<&str>,
    ) {
        let Self { id, token, .. } = self;
        // Writing to a Vec cannot fail.
        let _ = write!(
            out,
            "{method} /api/v1/{id}/{path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n{headers}"
        );
        write_body(out, body);
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
    let (user, revision) = (
        format!("{OFFSET} + n % {USERS}"),
        format!("n / {USERS} + 1"),
    );
    insert(&user, &revision, first, count)
}

/// Returns the query that counts the remaining tasks from number `first` on.
pub(crate) fn count_remaining(first: u64) -> String {
    let first = sql_id(&(OFFSET + first).to_string());
    format!("select count(*) from tasks where title = 'Delete me' and id >= {first}")
}

/// Returns the statement that creates tasks of one user.
pub(crate) fn insert_tasks_of(user: usize, first: u64, count: u64) -> String {
    insert(&format!("{OFFSET} + {user}"), "n", first, count)
}

fn insert(user: &str, revision: &str, first: u64, count: u64) -> String {
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
                n % 3 = 0, now(), now(), {revision}
         from generate_series({first}::bigint, {}) n",
        first + count - 1
    )
}
