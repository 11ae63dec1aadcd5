//! Questions of one kind that are asked at the same moment travel as one statement: a busy service
//! makes PostgreSQL work less for each of them, and an idle one asks each at once.
//!
//! Two tasks send what gathers, each the next statement when its last is answered, so that under
//! load what comes in the meantime goes together. One that is not answered soon, be it far away or
//! stuck, holds nobody up: another takes its place.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::{timeout, timeout_at};
use tokio_postgres::Row;

use super::{Database, DbError, Deadline, Held};

/// Statements of one kind under way that keep others waiting: few busy backends beat many
/// half-idle ones.
const SENDERS: usize = 2;
/// A statement that takes longer than this keeps nobody waiting any more.
const SOON: Duration = Duration::from_millis(2);

/// What several can ask for in one statement.
pub(super) trait Question: Sized + Send + Sync + 'static {
    /// So many in one statement at most.
    const MOST: usize;

    /// Where the questions of this kind come together.
    fn gathering(database: &Database) -> &Gathering<Self>;

    /// Asks them all. The last column of a row says which question it answers, counted from 1.
    fn ask(
        held: &mut Held,
        deadline: Deadline,
        questions: &[Self],
    ) -> impl Future<Output = Answer> + Send;
}

type Answer = Result<Vec<Row>, DbError>;

/// A question, and who waits for its answer.
struct Asked<Q> {
    question: Q,
    deadline: Deadline,
    answer: oneshot::Sender<Answer>,
}

/// Questions of one kind that have not been sent yet.
pub(super) struct Gathering<Q>(Mutex<Waiting<Q>>);

struct Waiting<Q> {
    asked: Vec<Asked<Q>>,
    senders: usize,
}

impl<Q> Default for Gathering<Q> {
    fn default() -> Self {
        Self(Mutex::new(Waiting {
            asked: Vec::new(),
            senders: 0,
        }))
    }
}

impl<Q: Question> Gathering<Q> {
    fn with<T>(&self, change: impl FnOnce(&mut Waiting<Q>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds a question; says whether it takes one more to send it.
    fn add(&self, asked: Asked<Q>) -> bool {
        self.with(|waiting| {
            waiting.asked.push(asked);
            let one_more = waiting.senders < SENDERS;
            waiting.senders += usize::from(one_more);
            one_more
        })
    }

    /// The deadline of the first question that waits; a sender that finds none leaves.
    fn first(&self, sender: &mut Sender<Q>) -> Option<Deadline> {
        self.with(|waiting| {
            let first = waiting.asked.first().map(|asked| asked.deadline);
            if first.is_none() {
                sender.leave(waiting);
            }
            first
        })
    }

    /// The next questions, so many at most.
    fn take(&self, most: usize) -> Vec<Asked<Q>> {
        self.with(|waiting| {
            let rest = waiting.asked.split_off(waiting.asked.len().min(most));
            std::mem::replace(&mut waiting.asked, rest)
        })
    }

    /// Whether another has to come in the place of this sender, which is stuck.
    fn replace(&self, sender: &mut Sender<Q>) -> bool {
        self.with(|waiting| {
            sender.leave(waiting);
            let one_more = !waiting.asked.is_empty();
            waiting.senders += usize::from(one_more);
            one_more
        })
    }
}

/// One of those that count, until it leaves or ends in a panic.
struct Sender<Q: Question> {
    database: Database,
    counts: bool,
    kind: PhantomData<Q>,
}

impl<Q: Question> Sender<Q> {
    /// Starts one that is counted already. It is a task of its own, so that a client that goes away
    /// takes nobody's answer with it.
    fn start(database: Database) {
        let mut sender = Self {
            database,
            counts: true,
            kind: PhantomData,
        };
        tokio::spawn(async move { sender.send().await });
    }

    async fn send(&mut self) {
        let database = self.database.clone();
        let gathering = Q::gathering(&database);
        loop {
            // Whatever else is ready to run may ask, too.
            yield_now().await;
            let Some(deadline) = gathering.first(self) else {
                return;
            };
            // First the connection: what is asked while it is waited for goes along.
            let held = database.hold(deadline).await;
            // Where there is none, there is none for anybody.
            let most = held.as_ref().map_or(usize::MAX, |_| Q::MOST);
            let mut asking = pin!(database.ask_all(held, gathering.take(most)));
            if timeout(SOON, asking.as_mut()).await.is_err() {
                if gathering.replace(self) {
                    Self::start(database.clone());
                }
                return asking.await;
            }
        }
    }

    fn leave(&mut self, waiting: &mut Waiting<Q>) {
        waiting.senders -= usize::from(self.counts);
        self.counts = false;
    }
}

impl<Q: Question> Drop for Sender<Q> {
    fn drop(&mut self) {
        let database = self.database.clone();
        Q::gathering(&database).with(|waiting| self.leave(waiting));
    }
}

impl Database {
    /// Asks a question together with all others of its kind that are asked at the same moment, and
    /// gives the rows that are its answer.
    pub(super) async fn gather<Q: Question>(&self, deadline: Deadline, question: Q) -> Answer {
        let (answer, answered) = oneshot::channel();
        let asked = Asked {
            question,
            deadline,
            answer,
        };
        if Q::gathering(self).add(asked) {
            Sender::<Q>::start(self.clone());
        }
        match timeout_at(deadline.at(), answered).await {
            Ok(Ok(answer)) => answer,
            _ => Err(DbError::Unavailable("a read was given up".into())),
        }
    }

    async fn ask_all<Q: Question>(&self, held: Result<Held, DbError>, asked: Vec<Asked<Q>>) {
        // Another sender may have been quicker.
        let Some(deadline) = asked.first().map(|asked| asked.deadline) else {
            return;
        };
        let (questions, waiting): (Vec<Q>, Vec<_>) = asked
            .into_iter()
            .map(|asked| (asked.question, asked.answer))
            .unzip();
        let questions = &questions;
        let ask = |held: Result<Held, DbError>| async move {
            Q::ask(&mut held?, deadline, questions).await
        };
        let answer = match ask(held).await {
            Err(DbError::Lost(_)) => {
                self.again_if_lost(deadline, || async { ask(self.hold(deadline).await).await })
                    .await
            }
            answer => answer,
        };
        match answer {
            Ok(rows) => {
                let mut rows = rows.into_iter().peekable();
                for (number, waiting) in (1_i64..).zip(waiting) {
                    let is_its = |row: &Row| row.get::<_, i64>(row.len() - 1) == number;
                    let answer = std::iter::from_fn(|| rows.next_if(is_its)).collect();
                    // Who went away needs none.
                    waiting.send(Ok(answer)).ok();
                }
            }
            Err(error) => {
                for waiting in waiting {
                    waiting.send(Err(error.clone())).ok();
                }
            }
        }
    }
}
