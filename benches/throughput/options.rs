//! The options.

use std::{env, net::SocketAddr, path::PathBuf, time::Duration};

use crate::{BCRYPT_COST, Result, peers, work::Work};

pub(crate) struct Options {
    pub(crate) seconds: Duration,
    pub(crate) rounds: usize,
    pub(crate) quick: bool,
    pub(crate) growth: bool,
    /// Empty for all kinds of work and the scenarios.
    pub(crate) only: Vec<Work>,
    /// Another build of the service.
    pub(crate) against: Option<PathBuf>,
    /// Fail if a ratio is lower than the floor of its row.
    pub(crate) floors: bool,
    /// PocketBase's program.
    pub(crate) peers: Option<PathBuf>,
    /// Run as the server with the constant response; the benchmark starts itself with this option.
    pub(crate) bare: Option<SocketAddr>,
}

impl Options {
    pub(crate) fn read() -> Result<Self> {
        let given = |flag: &str| env::args().any(|argument| argument == flag);
        let quick = given("--quick");
        let arguments: Vec<String> = env::args().collect();
        let values = |flag: &str| {
            let pairs = arguments.windows(2).filter(|pair| pair[0] == flag);
            let values = pairs.map(|pair| match pair[1].starts_with("--") {
                true => Err(format!("{flag} needs a value")),
                false => Ok(pair[1].clone()),
            });
            values.collect::<std::result::Result<Vec<_>, _>>()
        };
        let only = values("--only")?.into_iter().map(|name| {
            let work = Work::ALL.into_iter().find(|work| work.name() == name);
            work.ok_or_else(|| format!("there is no work `{name}`"))
        });
        let number = |name: &str, default: u64| match env::var(name) {
            Ok(text) => text
                .parse()
                .map_err(|_| format!("{name} must be a whole number")),
            Err(_) => Ok(default),
        };
        Ok(Self {
            seconds: Duration::from_secs(
                number("BENCH_SECONDS", if quick { 1 } else { 5 })?.max(1),
            ),
            rounds: number("BENCH_ROUNDS", if quick { 1 } else { 3 })?.max(1) as usize,
            quick,
            growth: given("--growth"),
            only: only.collect::<std::result::Result<_, _>>()?,
            against: values("--against")?.pop().map(PathBuf::from),
            floors: given("--floors"),
            peers: values("--peers")?.pop().map(PathBuf::from),
            bare: values("--bare")?
                .pop()
                .map(|address| address.parse())
                .transpose()?,
        })
    }

    pub(crate) fn work(&self) -> Vec<Work> {
        match self.only.as_slice() {
            [] => Work::ALL.to_vec(),
            only => only.to_vec(),
        }
    }

    /// Returns whether the scenarios are measured after the rows.
    pub(crate) fn has_scenarios(&self) -> bool {
        self.only.is_empty() && !self.floors
    }

    pub(crate) fn bcrypt_cost(&self) -> u32 {
        match self.peers {
            Some(_) => peers::BCRYPT_COST,
            None => BCRYPT_COST,
        }
    }

    /// Returns the number of measurements planned.
    pub(crate) fn steps(&self) -> usize {
        let parts = if self.against.is_some() { 3 } else { 2 };
        let rounds = self.rounds * self.work().len() * parts;
        let scenarios = match (self.has_scenarios(), self.growth) {
            (false, _) => 0,
            (true, false) => 9,
            (true, true) => 10,
        };
        // Creating the data is the first step.
        match self.peers {
            Some(_) => 2 + self.rounds * peers::ROWS.len() * 2,
            None => 1 + rounds + scenarios,
        }
    }
}
