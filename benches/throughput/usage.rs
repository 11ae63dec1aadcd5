//! CPU time and memory of processes, from `/proc`.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

/// The unit of CPU times in `/proc`, a clock tick.
const TICK: Duration = Duration::from_millis(10);

/// Samples the CPU time of processes.
pub(crate) struct CpuSampler {
    pub(crate) server: Option<u32>,
    pub(crate) postmaster: Option<u32>,
}

/// The CPU time used since the process started.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cpu {
    pub(crate) server: Option<Duration>,
    pub(crate) postgres: Option<Duration>,
    pub(crate) client: Option<Duration>,
}

impl Cpu {
    pub(crate) fn since(&self, before: &Cpu) -> Cpu {
        let passed =
            |now: Option<Duration>, then: Option<Duration>| Some(now?.saturating_sub(then?));
        Cpu {
            server: passed(self.server, before.server),
            postgres: passed(self.postgres, before.postgres),
            client: passed(self.client, before.client),
        }
    }
}

impl CpuSampler {
    pub(crate) fn cpu(&self) -> Cpu {
        Cpu {
            server: self.server.and_then(|pid| Some(Stat::of(pid)?.own)),
            postgres: self.postmaster.and_then(with_children),
            client: Stat::of(std::process::id()).map(|stat| stat.own),
        }
    }

    /// Samples once PostgreSQL has reaped its exiting backends, so that their CPU time is included.
    pub(crate) fn settled(&self) -> Cpu {
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut cpu = self.cpu();
        loop {
            thread::sleep(Duration::from_millis(50));
            let now = self.cpu();
            if now.postgres == cpu.postgres || Instant::now() > deadline {
                return now;
            }
            cpu = now;
        }
    }
}

/// The fields used from `/proc/<pid>/stat`.
struct Stat {
    parent: u32,
    own: Duration,
    /// CPU time of reaped children.
    ended: Duration,
}

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses can contain spaces; the state is the field after it.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at)?.parse().ok().map(|ticks: u32| TICK * ticks);
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own: ticks(11)? + ticks(12)?,
            ended: ticks(13)? + ticks(14)?,
        })
    }
}

/// Returns the CPU time of a process and all its children, such as PostgreSQL's backends.
fn with_children(pid: u32) -> Option<Duration> {
    let stat = Stat::of(pid)?;
    let children = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
        let child = Stat::of(entry.file_name().to_str()?.parse().ok()?)?;
        (child.parent == pid).then_some(child.own + child.ended)
    });
    Some(stat.own + stat.ended + children.sum::<Duration>())
}

/// Returns the resident memory of a process in MiB.
pub(crate) fn resident(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1024.0)
}
