//! The kinds of work, as requests for the service and as scripts for pgbench.

use std::io::Write;

use serde_json::json;

use crate::{
    PASSWORD, Result,
    data::{BenchUser, OFFSET, TASKS, USERS, email, id, owner, sql_id, write_body},
};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    List,
    /// A list that has not changed since the client read it.
    UnchangedList,
    /// A page of 20 changes of a list.
    Changes,
    Create,
    KeyedCreate,
    Update,
    Toggle,
    Delete,
    Mix,
    /// pgbench cannot do this, so it is not among `ALL`.
    Login,
}

impl Work {
    pub(crate) const ALL: [Work; 10] = [
        Work::Read,
        Work::List,
        Work::UnchangedList,
        Work::Changes,
        Work::Create,
        Work::KeyedCreate,
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
            Work::UnchangedList => "unchanged list",
            Work::Changes => "20 changes",
            Work::Create => "create",
            Work::KeyedCreate => "create with key",
            Work::Update => "update",
            Work::Toggle => "toggle",
            Work::Delete => "delete",
            Work::Mix => "80 % reads",
            Work::Login => "log in",
        }
    }

    pub(crate) fn writes(self) -> bool {
        use Work::{Changes, List, Login, Read, UnchangedList};
        !matches!(self, Read | List | UnchangedList | Changes | Login)
    }

    /// Returns the lowest ratio to pgbench that `--floors` accepts: about half of what is reached, so that
    /// noise stays above it.
    pub(crate) fn floor(self) -> Option<f64> {
        match self {
            Work::Read | Work::UnchangedList => Some(0.5),
            Work::List => Some(0.35),
            Work::Create => Some(0.6),
            Work::Update | Work::Toggle => Some(0.55),
            Work::Delete | Work::Mix => Some(0.4),
            Work::Changes => Some(0.15),
            Work::KeyedCreate => Some(0.45),
            Work::Login => None,
        }
    }

    /// Writes a request and returns the expected status. `range` is the number of the first task to
    /// delete.
    pub(crate) fn request(
        self,
        users: &[BenchUser],
        range: u64,
        rng: &mut Rng,
        out: &mut Vec<u8>,
    ) -> u16 {
        let task = rng.below(TASKS);
        let one = format!("/{}", id(task));
        let user = &users[owner(task)];
        match self {
            Work::Read => user.request(out, "GET", &one, None, 200),
            Work::List => user.request(out, "GET", "?limit=20", None, 200),
            Work::UnchangedList => {
                let condition = format_args!("If-None-Match: {}\r\n", user.list_tag);
                user.write(out, "GET", "tasks?limit=20", condition, None);
                304
            }
            Work::Changes => user.request_changes(out),
            Work::Create => user.request(out, "POST", "", Some(NEW_TASK), 201),
            Work::KeyedCreate => {
                let unique = rng.below(u64::MAX);
                let key = format_args!("Idempotency-Key: {range}-{unique:x}\r\n");
                user.write(out, "POST", "tasks", key, Some(NEW_TASK));
                201
            }
            Work::Update => {
                let body = format!(r#"{{"title": "Changed {}"}}"#, rng.below(1_000_000));
                user.request(out, "PATCH", &one, Some(&body), 200)
            }
            Work::Toggle => user.request(out, "PATCH", &format!("{one}/complete"), None, 200),
            Work::Delete => {
                let victim = range + rng.connection * rng.share + rng.count;
                rng.count += 1;
                users[owner(victim)].request(out, "DELETE", &format!("/{}", id(victim)), None, 204)
            }
            Work::Mix => {
                let mut point = rng.below(100);
                for (work, percent) in Self::MIX {
                    if point < percent {
                        return work.request(users, range, rng, out);
                    }
                    point -= percent;
                }
                unreachable!("the percentages add up to 100")
            }
            Work::Login => {
                let account = json!({"email": email(rng.below(USERS)), "password": PASSWORD});
                let _ = write!(out, "POST /api/v1/auth/login HTTP/1.1\r\nHost: bench\r\n");
                write_body(out, Some(&account.to_string()));
                200
            }
        }
    }

    /// Returns the script for pgbench: the plain statement on one row, or for a list on its rows. It sets
    /// `revision`, or names `task_lists`, so that the triggers for earlier releases do not fire.
    pub(crate) fn script(self, range: u64, share: u64) -> Result<String> {
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
            // An unchanged list is known by one row.
            Work::Read | Work::UnchangedList => {
                format!("{task}{owner}select {columns} from tasks {one};\n")
            }
            Work::List => format!(
                "{task}{owner}select {columns} from tasks where user_id = {user} order by id desc limit 20;\n"
            ),
            Work::Changes => format!(
                "{task}{owner}select {columns}, revision from tasks \
                 where user_id = {user} and revision > 1 order by revision limit 20;\n"
            ),
            // A range of ids for each client, so that no id is used twice.
            Work::Create | Work::KeyedCreate => format!(
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
                "\\set i :i + 1\n\\set n {OFFSET} + {range} + :client_id * {share} + :i\n{owner}\
                 delete /* task_lists */ from tasks {one};\n"
            ),
            Work::Mix => return Err("the mix is several scripts".into()),
            Work::Login => return Err("pgbench has no logins".into()),
        })
    }
}

const NEW_TASK: &str = r#"{"title": "Water the plants", "description": "All but the cactus"}"#;

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
