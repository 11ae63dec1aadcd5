//! The queue of jobs that hash passwords.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Weak;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The maximum number of threads that work for one network.
const MAX_RUNNING_PER_NETWORK: usize = 2;
/// The delay of a job for each job that its network added recently. It is half the time in which a
/// full queue drains, so that a client of a quiet network is served before the clients of busy
/// networks.
const DELAY_PER_JOB: Duration = Duration::from_secs(2);
/// The time in which a network's count of jobs halves.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// The number of counts. Networks may share one by chance.
const COUNTS: usize = 1 << 16;

pub(super) struct Job {
    pub(super) network: IpAddr,
    /// Expires when the caller stops waiting for the result.
    pub(super) caller: Weak<()>,
    pub(super) work: Box<dyn FnOnce() + Send>,
}

/// Jobs that wait for a thread. A job is due later the more jobs its network added recently. A
/// client of a quiet network is therefore served next, however many jobs of busy networks are
/// waiting.
pub(super) struct JobQueue {
    capacity: usize,
    /// The waiting jobs in order of arrival, each with the time at which it is due.
    waiting: Vec<(Instant, Job)>,
    /// The networks of the jobs that are running.
    running: Vec<IpAddr>,
    /// For each network, the number of jobs that it added recently, rejected ones included, and the
    /// time of the last one in seconds since `start`. The index is the hash of the network. This
    /// bounds the memory, but a flood of new networks raises the counts of all networks.
    recent: Vec<(f64, f64)>,
    hasher: RandomState,
    start: Instant,
}

impl JobQueue {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            waiting: Vec::new(),
            running: Vec::new(),
            // The operating system provides the memory when it is first used.
            recent: vec![(0.0, 0.0); COUNTS],
            hasher: RandomState::new(),
            start: Instant::now(),
        }
    }

    /// Adds a job. If the queue is full, drops the job of another network that is due last, or
    /// fails if that job is due no later than the new one.
    pub(super) fn add(&mut self, job: Job, now: Instant) -> Result<()> {
        let due = now + DELAY_PER_JOB * self.count(job.network, now);
        self.remove_abandoned();
        if self.waiting.len() >= self.capacity {
            let others = self.waiting.iter().enumerate();
            let others = others.filter(|(_, (_, other))| other.network != job.network);
            match others.max_by_key(|(_, (due, _))| *due) {
                Some((index, (last, _))) if *last > due => self.waiting.remove(index),
                _ => return Err(Error::Overloaded),
            };
        }
        self.waiting.push((due, job));
        Ok(())
    }

    /// Takes the next job out of the queue. Of the networks that may use another thread, chooses
    /// the one whose job is due first, and takes its oldest job.
    pub(super) fn start_next(&mut self) -> Option<Job> {
        self.remove_abandoned();
        let running = |network: IpAddr| self.running.iter().filter(|n| **n == network).count();
        let may_start = |job: &Job| running(job.network) < MAX_RUNNING_PER_NETWORK;
        let candidates = self.waiting.iter().filter(|(_, job)| may_start(job));
        let network = candidates.min_by_key(|(due, _)| *due)?.1.network;
        let mut jobs = self.waiting.iter();
        let index = jobs.position(|(_, job)| job.network == network)?;
        self.running.push(network);
        Some(self.waiting.remove(index).1)
    }

    /// Records that a job of this network has ended.
    pub(super) fn finish(&mut self, network: IpAddr) {
        if let Some(index) = self.running.iter().position(|other| *other == network) {
            self.running.swap_remove(index);
        }
    }

    fn remove_abandoned(&mut self) {
        self.waiting
            .retain(|(_, job)| job.caller.strong_count() > 0);
    }

    /// Counts a job. Returns the previous count, halved for each minute since the last job and
    /// rounded, so that a single job is forgotten after a minute.
    fn count(&mut self, network: IpAddr, now: Instant) -> u32 {
        let index = self.hasher.hash_one(network) as usize % COUNTS;
        let (count, updated) = &mut self.recent[index];
        let seconds = now.duration_since(self.start).as_secs_f64();
        let before = *count * (-(seconds - *updated) / HALF_LIFE.as_secs_f64()).exp2();
        (*count, *updated) = (before + 1.0, seconds);
        before.round() as u32
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn network(number: u8) -> IpAddr {
        [192, 0, 2, number].into()
    }

    /// A queue to which a caller adds jobs.
    struct Fixture {
        queue: JobQueue,
        caller: Arc<()>,
        now: Instant,
    }

    impl Fixture {
        fn new(capacity: usize) -> Self {
            Self {
                queue: JobQueue::new(capacity),
                caller: Arc::default(),
                now: Instant::now(),
            }
        }

        /// Whether the queue accepts a job of this network.
        fn add(&mut self, number: u8) -> bool {
            let job = Job {
                network: network(number),
                caller: Arc::downgrade(&self.caller),
                work: Box::new(|| ()),
            };
            self.queue.add(job, self.now).is_ok()
        }

        /// Runs all jobs one after another, and compares their networks with `expected`.
        fn assert_order(&mut self, expected: &[u8]) {
            for number in expected {
                let job = self.queue.start_next();
                assert_eq!(job.map(|job| job.network), Some(network(*number)));
                self.queue.finish(network(*number));
            }
            assert!(self.queue.start_next().is_none());
        }
    }

    #[test]
    fn a_quiet_network_is_served_before_the_next_job_of_a_busy_one() {
        let mut fixture = Fixture::new(10);
        assert!([1, 1, 1, 2, 2, 3].iter().all(|number| fixture.add(*number)));
        fixture.assert_order(&[1, 2, 3, 1, 2, 1]);
        // Networks 1 to 3 have a history, network 4 has none.
        assert!([3, 2, 1, 4].iter().all(|number| fixture.add(*number)));
        fixture.assert_order(&[4, 3, 2, 1]);
    }

    #[test]
    fn jobs_of_one_network_are_served_in_order_of_arrival_and_two_at_a_time() {
        let mut fixture = Fixture::new(100);
        assert!((0..100).all(|_| fixture.add(1)));
        for _ in 0..97 {
            assert!(fixture.queue.start_next().is_some());
            fixture.queue.finish(network(1));
        }
        // The new job of network 1 is due before the earlier ones.
        fixture.now += HALF_LIFE;
        assert!(fixture.add(1) && fixture.add(2));
        let new = fixture.queue.waiting[3].0;
        assert!(new < fixture.queue.waiting[0].0);
        let mut start = || fixture.queue.start_next().map(|job| job.network);
        assert_eq!([start(), start()], [Some(network(2)), Some(network(1))]);
        assert_eq!([start(), start()], [Some(network(1)), None]);
        fixture.queue.finish(network(1));
        assert!(fixture.queue.start_next().is_some());
        assert_eq!(fixture.queue.waiting[0].0, new);
    }

    #[test]
    fn a_full_queue_makes_room_for_a_quiet_network_only() {
        let mut fixture = Fixture::new(4);
        assert!([1, 1, 2, 2].iter().all(|number| fixture.add(*number)));
        assert!(!fixture.add(1) && !fixture.add(2));
        assert!(fixture.add(3));
        fixture.caller = Arc::default();
        assert!(
            fixture.add(1),
            "the jobs of a caller that left keep their room"
        );
        fixture.assert_order(&[1]);
    }
}
