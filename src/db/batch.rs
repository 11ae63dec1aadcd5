//! Questions of one kind that are asked at the same moment travel as one statement: a busy service
//! makes PostgreSQL work less for each of them, and an idle one asks each at once.
//!
//! Two senders of each kind send what gathers, each the next statement when its last is answered,
//! so that under load what is asked in the meantime goes together. One whose answer is late, be the
//! database far away or the connection stuck, holds nobody up: another takes its place.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::{timeout, timeout_at};
use tokio_postgres::Row;

use super::{Database, DbError, Deadline, Lease, Queries, Repeat};

/// Statements of one kind under way that keep others waiting: few busy backends beat many
/// half-idle ones.
const MAX_FAST_WORKERS: usize = 2;
/// A statement that takes longer than this keeps nobody waiting any more …
const SLOW_AFTER: Duration = Duration::from_millis(2);
/// … until there are so many of one kind: the pool is not theirs alone.
const MAX_WORKERS: usize = 8;

/// What several can ask for in one statement.
pub(super) trait BatchQuery: Sized + Send + Sync + 'static {
    /// So many in one statement at most.
    const MAX_BATCH: usize;

    /// Where the questions of this kind come together.
    fn batcher(database: &Database) -> &Batcher<Self>;

    /// Asks them all. The last column of a row says which question it answers, counted from 1.
    fn execute(
        lease: &mut Lease,
        deadline: Deadline,
        questions: &[Self],
    ) -> impl Future<Output = Answer> + Send;
}

type Answer = Result<Vec<Row>, DbError>;

/// A question, and where its answer goes.
struct Pending<Q> {
    question: Q,
    deadline: Deadline,
    reply: oneshot::Sender<Answer>,
}

/// Questions of one kind that have not been sent yet.
pub(super) struct Batcher<Q>(Mutex<Queue<Q>>);

struct Queue<Q> {
    asked: Vec<Pending<Q>>,
    prompt: usize,
    late: usize,
}

impl<Q> Default for Batcher<Q> {
    fn default() -> Self {
        Self(Mutex::new(Queue {
            asked: Vec::new(),
            prompt: 0,
            late: 0,
        }))
    }
}

impl<Q> Queue<Q> {
    /// Forgets who went away or ran out of time.
    fn tidy(&mut self) {
        self.asked.retain(|asked| !asked.reply.is_closed());
    }

    /// Makes room for one more sender, if it takes one to send what waits.
    fn takes_one_more(&mut self) -> bool {
        let one_more = !self.asked.is_empty()
            && self.prompt < MAX_FAST_WORKERS
            && self.prompt + self.late < MAX_WORKERS;
        self.prompt += usize::from(one_more);
        one_more
    }
}

impl<Q: BatchQuery> Batcher<Q> {
    fn with<T>(&self, work: impl FnOnce(&mut Queue<Q>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The next questions, so many at most.
    fn take(&self, most: usize) -> Vec<Pending<Q>> {
        self.with(|queue| {
            queue.tidy();
            let rest = queue.asked.split_off(queue.asked.len().min(most));
            std::mem::replace(&mut queue.asked, rest)
        })
    }
}

/// What the queue counts a sender as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Prompt,
    Late,
    Gone,
}

/// One that sends what gathers, until there is nothing left.
struct Worker<Q: BatchQuery> {
    database: Database,
    standing: Standing,
    kind: PhantomData<Q>,
}

impl<Q: BatchQuery> Worker<Q> {
    /// Starts one that the queue has made room for. It is a task of its own, so that a client that
    /// goes away takes nobody's answer with it.
    fn start(database: Database) {
        let mut sender = Self {
            database,
            standing: Standing::Prompt,
            kind: PhantomData,
        };
        tokio::spawn(async move { sender.send().await });
    }

    async fn send(&mut self) {
        let database = self.database.clone();
        loop {
            // Whatever else is ready to run may ask, too.
            yield_now().await;
            let Some((deadline, count)) = self.look() else {
                return;
            };
            // First the connection: what is asked while it is waited for goes along. If there is
            // none, those have waited in vain who have waited all the time.
            let queries = database.with_deadline(deadline);
            let acquire = || database.acquire(deadline);
            let lease = queries.retry(Repeat::Read, acquire).await;
            let most = lease.as_ref().map_or(count, |_| Q::MAX_BATCH);
            let asked = Q::batcher(&database).take(most);
            let mut asking = pin!(database.run_batch(lease, asked));
            if timeout(SLOW_AFTER, asking.as_mut()).await.is_err() {
                let replaced = self.change(|queue| {
                    queue.late += 1;
                    (Standing::Late, queue.takes_one_more())
                });
                if replaced {
                    Self::start(database.clone());
                }
                asking.await;
                self.change(|queue| match queue.prompt < MAX_FAST_WORKERS {
                    true => {
                        queue.prompt += 1;
                        (Standing::Prompt, ())
                    }
                    false => (Standing::Gone, ()),
                });
                if self.standing == Standing::Gone {
                    return;
                }
            }
        }
    }

    /// The last deadline of those who wait, and how many they are; a sender that finds none goes.
    fn look(&mut self) -> Option<(Deadline, usize)> {
        self.change(|queue| {
            queue.tidy();
            let deadline = queue.asked.iter().map(|asked| asked.deadline).max();
            match deadline {
                Some(deadline) => {
                    queue.prompt += 1;
                    (Standing::Prompt, Some((deadline, queue.asked.len())))
                }
                None => (Standing::Gone, None),
            }
        })
    }

    /// Takes this sender out of the count; `work` says what it is from now on, and counts that.
    fn change<T>(&mut self, work: impl FnOnce(&mut Queue<Q>) -> (Standing, T)) -> T {
        let before = self.standing;
        let (standing, result) = Q::batcher(&self.database).with(|queue| {
            match before {
                Standing::Prompt => queue.prompt -= 1,
                Standing::Late => queue.late -= 1,
                Standing::Gone => {}
            }
            work(queue)
        });
        self.standing = standing;
        result
    }
}

impl<Q: BatchQuery> Drop for Worker<Q> {
    /// After a panic it must not count on.
    fn drop(&mut self) {
        self.change(|_| (Standing::Gone, ()));
    }
}

impl Queries<'_> {
    /// Asks a question together with all others of its kind that are asked at the same moment, and
    /// gives the rows that are its answer.
    pub(super) async fn submit<Q: BatchQuery>(&self, question: Q) -> Answer {
        let (reply, answered) = oneshot::channel();
        let asked = Pending {
            question,
            deadline: self.deadline,
            reply,
        };
        let one_more = Q::batcher(self.database).with(|queue| {
            queue.asked.push(asked);
            queue.takes_one_more()
        });
        if one_more {
            Worker::<Q>::start(self.database.clone());
        }
        match timeout_at(self.deadline.at(), answered).await {
            Ok(Ok(answer)) => answer,
            _ => Err(DbError::Unavailable("a read ran out of time".into())),
        }
    }
}

impl Database {
    async fn run_batch<Q: BatchQuery>(
        &self,
        lease: Result<Lease, DbError>,
        asked: Vec<Pending<Q>>,
    ) {
        // Another sender may have been quicker.
        let Some(deadline) = asked.iter().map(|asked| asked.deadline).max() else {
            return;
        };
        let (questions, askers): (Vec<Q>, Vec<_>) = asked
            .into_iter()
            .map(|asked| (asked.question, asked.reply))
            .unzip();
        let answer = match lease {
            Ok(lease) => self.execute_with_retry(lease, deadline, &questions).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(rows) => {
                let mut rows = rows.into_iter().peekable();
                for (number, reply) in (1_i64..).zip(askers) {
                    let is_its = |row: &Row| row.get::<_, i64>(row.len() - 1) == number;
                    let answer = std::iter::from_fn(|| rows.next_if(is_its)).collect();
                    // Who went away needs none.
                    reply.send(Ok(answer)).ok();
                }
            }
            Err(error) => {
                for reply in askers {
                    reply.send(Err(error.clone())).ok();
                }
            }
        }
    }

    /// Asks over this connection; if it is lost, over a fresh one.
    async fn execute_with_retry<Q: BatchQuery>(
        &self,
        mut lease: Lease,
        deadline: Deadline,
        questions: &[Q],
    ) -> Answer {
        match Q::execute(&mut lease, deadline, questions).await {
            Err(DbError::ConnectionLost(_) | DbError::Transient(_)) => {
                drop(lease);
                self.with_deadline(deadline)
                    .retry(Repeat::Read, || async {
                        Q::execute(&mut self.acquire(deadline).await?, deadline, questions).await
                    })
                    .await
            }
            answer => answer,
        }
    }
}
