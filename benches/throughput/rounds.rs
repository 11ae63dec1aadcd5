//! The rows of the table: each kind of work with every program, one after the other.

use std::{env, fs, net::SocketAddr, process::Command, time::Duration};

use serde_json::json;

use crate::{
    Bench, CONNECTIONS, Result,
    client::{Load, load},
    data::{count_remaining, insert_tasks},
    processes::{Process, await_response, free_address},
    report::{Pgbench, Round},
    usage::CpuSampler,
    work::Work,
};

impl Bench {
    pub(crate) fn watched(&self) -> CpuSampler {
        CpuSampler {
            server: Some(self.server.id()),
            postmaster: self.database.postmaster,
        }
    }

    /// Measures the client against the server with the constant response.
    pub(crate) fn constant(&mut self) -> Result<()> {
        self.step("a constant response");
        let address = free_address()?;
        let mut command = Command::new(env::current_exe()?);
        let process = Process::spawn(command.arg("--bare").arg(address.to_string()))?;
        await_response(address, "/")?;
        let watched = CpuSampler {
            server: Some(process.id()),
            postmaster: None,
        };
        let users = &self.users;
        let seen = load(
            address,
            CONNECTIONS,
            self.options.seconds,
            0,
            &watched,
            &|rng, out| Work::Read.request(users, 0, rng, out),
        )?;
        self.report.record(
            "constant_response",
            json!({
                "requests_per_second": seen.rate(),
                "server_us": seen.cost(seen.cpu.server),
                "client_us": seen.cost(seen.cpu.client),
            }),
        )
    }

    /// Measures one kind of work with every program; `first` selects the order.
    pub(crate) fn round(&mut self, work: Work, first: usize) -> Result<()> {
        let mut round = Round::default();
        let outcome = self.measure(work, first, &mut round);
        self.report.record_round(work.name(), &round)?;
        outcome
    }

    /// Compares each ratio with its floor. A row below it is measured once more, because the speed of a
    /// shared machine varies.
    pub(crate) fn check_floors(&mut self) -> Result<()> {
        for work in self.options.work() {
            let Some(floor) = work.floor() else {
                continue;
            };
            if self.report.ratio(work.name(), "median") >= floor {
                continue;
            }
            self.steps += 2;
            self.round(work, 0)?;
            let best = self.report.ratio(work.name(), "highest");
            if best < floor {
                let row = format!("{} reaches {best:.2} instead of {floor}", work.name());
                self.below_floor.push(row);
            }
        }
        Ok(())
    }

    fn measure(&mut self, work: Work, first: usize, round: &mut Round) -> Result<()> {
        let other = self.other.as_ref();
        let other = other.map(|(process, address)| (process.id(), *address));
        let parts = if other.is_some() { 3 } else { 2 };
        for turn in first..first + parts {
            match turn % parts {
                0 => round.service = Some(self.service(work, self.server.id(), self.address)?),
                1 => round.pgbench = Some(self.pgbench(work)?),
                _ => {
                    if let Some((process, address)) = other {
                        round.other = Some(self.service(work, process, address)?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Prepares the database, so that every measurement starts from the same state. Returns the number of
    /// tasks that each of `clients` can delete.
    pub(crate) fn prepare(&mut self, work: Work, clients: u64, length: Duration) -> Result<u64> {
        let mut share = 0;
        if work == Work::Delete {
            share = (length.as_secs() + 1) * self.deletes_per_second / clients;
            self.range += 1_000_000_000;
            self.database
                .sql(&[&insert_tasks(self.range, share * clients)])?;
        }
        if work == Work::KeyedCreate {
            self.range += 1_000_000_000;
        }
        if work.writes() {
            self.database.sql(&["vacuum analyze tasks", "checkpoint"])?;
        }
        Ok(share)
    }

    /// Measures one kind of work with the server of this process id.
    pub(crate) fn service(&mut self, work: Work, server: u32, address: SocketAddr) -> Result<Load> {
        self.step(&format!("{}: the service", work.name()));
        loop {
            let length = self.options.seconds;
            let share = self.prepare(work, CONNECTIONS as u64, length)?;
            if matches!(work, Work::UnchangedList | Work::Changes) {
                for user in &mut self.users {
                    user.read_list_state(address)?;
                }
            }
            let (users, range) = (&self.users, self.range);
            let watched = CpuSampler {
                server: Some(server),
                postmaster: self.database.postmaster,
            };
            let load = load(
                address,
                CONNECTIONS,
                length,
                share,
                &watched,
                &|rng, out| work.request(users, range, rng, out),
            )?;
            if !load.ran_out {
                return Ok(load);
            }
            self.deletes_per_second *= 2;
        }
    }

    fn pgbench(&mut self, work: Work) -> Result<Pgbench> {
        self.step(&format!("{}: pgbench", work.name()));
        let mix = if work == Work::Mix {
            Work::MIX.to_vec()
        } else {
            vec![(work, 1)]
        };
        loop {
            let length = self.options.seconds;
            let share = self.prepare(work, 20, length)?;
            let mut scripts = Vec::new();
            for (work, weight) in &mix {
                let path = self.directory.path().join(format!("{}.sql", work.name()));
                fs::write(&path, work.script(self.range, share)?)?;
                scripts.push((path, *weight));
            }
            let before = self.watched().cpu();
            let (rate, done) = self.database.pgbench(&scripts, length)?;
            let cpu = self.watched().settled().since(&before).postgres;
            if work == Work::Delete {
                let left = self.database.sql(&[&count_remaining(self.range)])?;
                // Some deletes found no task.
                if share as f64 * 20.0 - left.trim().parse::<f64>()? < done {
                    self.deletes_per_second *= 2;
                    continue;
                }
            }
            let postgres_us = cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / done);
            return Ok(Pgbench { rate, postgres_us });
        }
    }
}
