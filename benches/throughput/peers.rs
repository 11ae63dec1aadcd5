//! The comparison with PocketBase, which stores the same users and tasks in SQLite.
//!
//! The collection's rules let a user see and change only their own tasks. What PocketBase leaves to the
//! operator is set in its favour: its log of requests is off, and an index serves the list. It does
//! not wait for the disk before it acknowledges a write; the service does.

use std::{
    fs,
    io::Write,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use serde_json::{Value, json};

use crate::{
    Bench, CONNECTIONS, LOGIN_CLIENTS, PASSWORD, Result,
    client::{Load, Writer, fetch, load},
    data::{TASKS, USERS, email, owner, write_body},
    interrupt::check,
    processes::{Process, await_response, free_address, output},
    report::Round,
    usage::CpuSampler,
    work::{Rng, Work},
};

/// PocketBase's default, which the service uses in this comparison as well.
pub(crate) const BCRYPT_COST: u32 = 10;

/// The rows, and whether clients log in meanwhile.
pub(crate) const ROWS: [(Work, bool); 6] = [
    (Work::Read, false),
    (Work::List, false),
    (Work::Create, false),
    (Work::Update, false),
    (Work::Login, false),
    (Work::Read, true),
];

/// The number of records in a batch. It divides the numbers of users and tasks, and hashing that many
/// passwords takes less time than a request may take.
const BATCH: usize = 20;
const RECORDS: &str = "/api/collections/tasks/records";
const SUPERUSER: &str = "root@bench.example";

impl Bench {
    /// Measures the rows with the service and with PocketBase in every round.
    pub(crate) fn compare_with_pocketbase(&mut self, program: &Path) -> Result<()> {
        self.step("creating the same users and tasks in PocketBase");
        let pocketbase = PocketBase::start(program, &self.directory.path().join("pocketbase"))?;
        for round in 0..self.options.rounds {
            for (at, (work, logins)) in ROWS.into_iter().enumerate() {
                let meanwhile = format!(" while {LOGIN_CLIENTS} clients log in");
                let name = work.name().to_owned() + if logins { &meanwhile } else { "" };
                let mut results = Round::default();
                // Alternate which program comes first.
                let outcome: Result<()> = (round + at..round + at + 2).try_for_each(|turn| {
                    let peer = (turn % 2 == 1).then_some(&pocketbase);
                    let load = self.load_peer(&name, work, logins, peer)?;
                    match peer {
                        None => results.service = Some(load),
                        Some(_) => results.other = Some(load),
                    }
                    Ok(())
                });
                self.report.record_round(&name, &results)?;
                outcome?;
            }
        }
        Ok(())
    }

    /// Measures PocketBase or, without it, the service.
    fn load_peer(
        &mut self,
        name: &str,
        work: Work,
        logins: bool,
        peer: Option<&PocketBase>,
    ) -> Result<Load> {
        let program = peer.map_or("the service", |_| "PocketBase");
        self.step(&format!("{name}: {program}"));
        let (address, watched) = match peer {
            None => {
                self.prepare(work, CONNECTIONS as u64, self.options.seconds)?;
                (self.address, self.watched())
            }
            Some(peer) => (peer.address, peer.cpu_sampler()),
        };
        let (users, length) = (&self.users, self.options.seconds);
        let write = |work: Work, rng: &mut Rng, out: &mut Vec<u8>| match peer {
            None => work.request(users, 0, rng, out),
            Some(peer) => peer.request(work, rng, out),
        };
        let run =
            |connections, writer: &Writer| load(address, connections, length, 0, &watched, writer);
        let log_in = || run(LOGIN_CLIENTS, &|rng, out| write(Work::Login, rng, out));
        if work == Work::Login {
            return log_in();
        }
        thread::scope(|scope| {
            let beside = logins.then(|| scope.spawn(log_in));
            let load = run(CONNECTIONS, &|rng, out| write(work, rng, out))?;
            if let Some(beside) = beside {
                beside.join().map_err(|_| "the login clients panicked")??;
            }
            Ok(load)
        })
    }
}

struct PocketBase {
    process: Process,
    address: SocketAddr,
    /// A token of each user.
    tokens: Vec<String>,
}

impl PocketBase {
    /// Starts PocketBase and creates its data.
    fn start(program: &Path, directory: &Path) -> Result<Self> {
        fs::create_dir(directory)?;
        let command = || {
            let mut command = Command::new(program);
            command.arg("--dir").arg(directory.join("data"));
            command
        };
        output(command().args(["superuser", "upsert", SUPERUSER, PASSWORD]))?;
        let address = free_address()?;
        let log = fs::File::create(directory.join("log"))?;
        let mut serve = command();
        serve.args(["serve", "--http", &address.to_string()]);
        serve.stdin(Stdio::null()).stdout(log.try_clone()?);
        let process = Process::spawn(serve.stderr(log))?;
        await_response(address, "/api/health")?;
        let mut pocketbase = Self {
            process,
            address,
            tokens: Vec::new(),
        };
        pocketbase.fill()?;
        Ok(pocketbase)
    }

    fn cpu_sampler(&self) -> CpuSampler {
        CpuSampler {
            server: Some(self.process.id()),
            postmaster: None,
        }
    }

    fn fill(&mut self) -> Result<()> {
        let path = "/api/collections/_superusers/auth-with-password";
        let account = json!({"identity": SUPERUSER, "password": PASSWORD});
        let admin = token(&self.call("POST", path, "", &account)?)?;
        let settings = json!({
            "batch": {"enabled": true, "maxRequests": BATCH, "timeout": 60},
            "logs": {"maxDays": 0},
        });
        self.call("PATCH", "/api/settings", &admin, &settings)?;
        self.call("POST", "/api/collections", &admin, &collection())?;
        self.create_all(&admin, "users", USERS, |n| {
            json!({
                "id": user_id(n), "email": email(n), "password": PASSWORD, "passwordConfirm": PASSWORD,
            })
        })?;
        self.create_all(&admin, "tasks", TASKS, |n| {
            json!({
                "id": task_id(n), "user": user_id(owner(n) as u64), "title": format!("Task {n}"),
                "description": "Something that is to be done before long", "completed": n % 3 == 0,
            })
        })?;
        for n in 0..USERS {
            check()?;
            let path = format!("/api/collections/users/impersonate/{}", user_id(n));
            let response = self.call("POST", &path, &admin, &json!({}))?;
            self.tokens.push(token(&response)?);
        }
        Ok(())
    }

    /// Creates the records of a collection in batches.
    fn create_all(
        &self,
        admin: &str,
        collection: &str,
        count: u64,
        record: impl Fn(u64) -> Value,
    ) -> Result<()> {
        let url = format!("/api/collections/{collection}/records");
        let create = |n| json!({"method": "POST", "url": url, "body": record(n)});
        for first in (0..count).step_by(BATCH) {
            check()?;
            let requests: Vec<Value> = (first..first + BATCH as u64).map(create).collect();
            self.call("POST", "/api/batch", admin, &json!({"requests": requests}))?;
        }
        Ok(())
    }

    /// Sends a request and returns the body of the response.
    fn call(&self, method: &str, path: &str, token: &str, body: &Value) -> Result<String> {
        let mut request = Vec::new();
        write_request(&mut request, method, path, token, Some(body));
        let (status, response) = fetch(self.address, &request)?;
        let (_, body) = response.split_once("\r\n\r\n").unwrap_or_default();
        match status {
            200 => Ok(body.to_owned()),
            _ => Err(format!("PocketBase: {method} {path}: {status} {body}").into()),
        }
    }

    /// Writes a request and returns the expected status.
    fn request(&self, work: Work, rng: &mut Rng, out: &mut Vec<u8>) -> u16 {
        let n = rng.below(TASKS);
        let (user, one) = (owner(n), format!("{RECORDS}/{}", task_id(n)));
        let token = &self.tokens[user];
        match work {
            Work::List => {
                let path = format!("{RECORDS}?perPage=20&skipTotal=1&sort=-created");
                write_request(out, "GET", &path, token, None);
            }
            Work::Create => {
                let user = user_id(user as u64);
                let description = "All but the cactus";
                let task =
                    json!({"user": user, "title": "Water the plants", "description": description});
                write_request(out, "POST", RECORDS, token, Some(&task));
            }
            Work::Update => {
                let change = json!({"title": format!("Changed {}", rng.below(1_000_000))});
                write_request(out, "PATCH", &one, token, Some(&change));
            }
            Work::Login => {
                let account = json!({"identity": email(rng.below(USERS)), "password": PASSWORD});
                let path = "/api/collections/users/auth-with-password";
                write_request(out, "POST", path, "", Some(&account));
            }
            _ => write_request(out, "GET", &one, token, None),
        }
        200
    }
}

fn write_request(out: &mut Vec<u8>, method: &str, path: &str, token: &str, body: Option<&Value>) {
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{method} {path} HTTP/1.1\r\nHost: bench\r\n");
    let _ = write!(out, "Authorization: {token}\r\n");
    write_body(out, body.map(Value::to_string).as_deref());
}

fn user_id(n: u64) -> String {
    format!("u{n:014}")
}

fn task_id(n: u64) -> String {
    format!("t{n:014}")
}

/// Reads the token in the response to a login.
fn token(response: &str) -> Result<String> {
    let response: Value = serde_json::from_str(response)?;
    let token = response["token"].as_str();
    Ok(token.ok_or("PocketBase returned no token")?.to_owned())
}

/// Returns the collection of tasks.
fn collection() -> Value {
    let own = "user = @request.auth.id";
    json!({
        "name": "tasks", "type": "base",
        "listRule": own, "viewRule": own, "createRule": own, "updateRule": own, "deleteRule": own,
        "fields": [
            {"name": "user", "type": "relation", "collectionId": "_pb_users_auth_",
             "cascadeDelete": true, "required": true, "maxSelect": 1},
            {"name": "title", "type": "text", "required": true, "max": 200},
            {"name": "description", "type": "text", "max": 1000},
            {"name": "completed", "type": "bool"},
            {"name": "created", "type": "autodate", "onCreate": true},
            {"name": "updated", "type": "autodate", "onCreate": true, "onUpdate": true},
        ],
        "indexes": ["create index tasks_of_user on tasks (user, created)"],
    })
}
