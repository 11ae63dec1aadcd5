//! Queries of one kind that arrive together run as one statement, which costs PostgreSQL far less
//! than one statement each.
//!
//! [`Batcher::submit`] puts a query into a queue. A dispatcher task waits for a free worker, takes
//! all queries queued by then, and hands them, together with a connection, to the worker: a task
//! that runs the statement and sends each caller its rows. On an idle service, a query runs
//! immediately and alone.
//!
//! Few workers run at a time, so that batches grow while they are busy. A statement that turns out
//! to be slow no longer counts towards that limit, so the queries behind it do not wait for it. A
//! caller that gives up, or a panic in a task, affects no other query.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{timeout, timeout_at};
use tokio_postgres::Row;
use uuid::Uuid;

use super::connections::Connections;
use super::deadline::Deadline;
use super::error::{DbError, Result};
use super::lease::Lease;
use super::retry::Repeat;

/// The maximum number of workers per kind whose statement is fast. A few busy backends achieve more
/// than many half-idle ones.
const MAX_FAST_WORKERS: usize = 2;
/// A statement that runs longer than this counts as slow.
const SLOW_AFTER: Duration = Duration::from_millis(2);
/// The maximum number of workers per kind. Slow statements leave most of the pool to other
/// requests.
const MAX_WORKERS: usize = 8;
/// The maximum number of queries per kind that wait for the dispatcher. Callers wait while the
/// queue is full.
const QUEUE_CAPACITY: usize = 1024;

/// A query that can share a statement with others of its kind.
pub(super) trait BatchQuery: Sized + Send + Sync + 'static {
    /// The maximum number of rows that one statement returns, which bounds its memory.
    const MAX_ROWS: usize;

    /// The number of rows that this query counts as in a batch: at least the maximum that it
    /// returns. A higher number makes batches smaller.
    fn max_rows(&self) -> usize;

    /// The user whose rows the query reads.
    fn user_id(&self) -> Uuid;

    /// Runs the queries. The rows are ordered by the column `ordinal`, the 1-based index of the
    /// query that they belong to, and name their owner in the column `user_id`.
    fn execute(
        lease: &mut Lease,
        deadline: Deadline,
        queries: &[Self],
    ) -> impl Future<Output = Result<Vec<Row>>> + Send;
}

/// A queued query. A caller that gives up drops the receiver of `reply`.
struct Pending<Q> {
    query: Q,
    deadline: Deadline,
    reply: Reply,
}

type Reply = oneshot::Sender<Result<Vec<Row>>>;
type Permit = Option<OwnedSemaphorePermit>;

/// The queue to the dispatcher of one kind of query.
pub(super) struct Batcher<Q>(Mutex<Option<mpsc::Sender<Pending<Q>>>>);

impl<Q> Default for Batcher<Q> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<Q: BatchQuery> Batcher<Q> {
    /// Runs a query together with others and returns its rows.
    pub(super) async fn submit(
        &self,
        connections: &Arc<Connections>,
        deadline: Deadline,
        query: Q,
    ) -> Result<Vec<Row>> {
        let (reply, response) = oneshot::channel();
        let pending = Pending {
            query,
            deadline,
            reply,
        };
        let queue = self.queue(connections);
        let rows = async {
            // If the dispatcher is gone, so is the sender of the reply.
            queue.send(pending).await.ok();
            response.await
        };
        match timeout_at(deadline.at(), rows).await {
            Ok(Ok(rows)) => rows,
            Ok(Err(_)) => Err(DbError::Unavailable("a batch of queries failed".into())),
            Err(_) => Err(DbError::Unavailable("a query timed out".into())),
        }
    }

    /// Returns the queue of the running dispatcher. Starts a dispatcher on the first call, and
    /// again if the previous one has panicked.
    fn queue(&self, connections: &Arc<Connections>) -> mpsc::Sender<Pending<Q>> {
        let mut queue = self.0.lock();
        match &*queue {
            Some(queue) if !queue.is_closed() => queue.clone(),
            _ => {
                let (sender, receiver) = mpsc::channel(QUEUE_CAPACITY);
                tokio::spawn(dispatch(connections.clone(), receiver));
                queue.insert(sender).clone()
            }
        }
    }
}

/// Collects batches and starts a worker for each, until every [`Batcher`] of the queue is dropped.
async fn dispatch<Q: BatchQuery>(
    connections: Arc<Connections>,
    mut queue: mpsc::Receiver<Pending<Q>>,
) {
    let workers = Arc::new(Semaphore::new(MAX_WORKERS));
    let fast_workers = Arc::new(Semaphore::new(MAX_FAST_WORKERS));
    let mut waiting: Vec<Pending<Q>> = Vec::new();
    loop {
        let fast_permit = fast_workers.clone().acquire_owned().await.ok();
        let permit = workers.clone().acquire_owned().await.ok();
        if waiting.is_empty() && queue.recv_many(&mut waiting, QUEUE_CAPACITY).await == 0 {
            return;
        }
        // Lets other ready tasks submit their queries as well.
        yield_now().await;
        receive(&mut queue, &mut waiting);
        let Some(deadline) = latest_deadline(&waiting) else {
            continue;
        };
        let queued_before = waiting.len();
        let acquire = || connections.acquire(deadline);
        match connections.retry(deadline, Repeat::Read, acquire).await {
            Ok(lease) => {
                // Queries that arrived while the connection was acquired join the batch.
                receive(&mut queue, &mut waiting);
                let batch = waiting.drain(..batch_size(&waiting)).collect();
                let permits = (fast_permit, permit);
                tokio::spawn(run_batch(connections.clone(), lease, batch, permits));
            }
            // Queries that arrived during the attempt remain queued for the next one.
            Err(error) => fail(waiting.drain(..queued_before).map(|p| p.reply), &error),
        }
    }
}

/// Moves queued queries to `waiting`, and drops those whose callers have given up.
fn receive<Q>(queue: &mut mpsc::Receiver<Pending<Q>>, waiting: &mut Vec<Pending<Q>>) {
    let room = QUEUE_CAPACITY.saturating_sub(waiting.len());
    waiting.extend(std::iter::from_fn(|| queue.try_recv().ok()).take(room));
    waiting.retain(|pending| !pending.reply.is_closed());
}

/// How many of the waiting queries fit into one statement.
fn batch_size<Q: BatchQuery>(waiting: &[Pending<Q>]) -> usize {
    let rows = waiting.iter().scan(0, |rows, pending| {
        *rows += pending.query.max_rows();
        Some(*rows)
    });
    rows.take_while(|rows| *rows <= Q::MAX_ROWS).count()
}

fn latest_deadline<Q>(batch: &[Pending<Q>]) -> Option<Deadline> {
    batch.iter().map(|pending| pending.deadline).max()
}

/// Runs the statement of a batch and sends each caller its rows.
async fn run_batch<Q: BatchQuery>(
    connections: Arc<Connections>,
    lease: Lease,
    batch: Vec<Pending<Q>>,
    (fast_permit, _permit): (Permit, Permit),
) {
    let Some(deadline) = latest_deadline(&batch) else {
        return;
    };
    let (queries, replies): (Vec<Q>, Vec<Reply>) = batch
        .into_iter()
        .map(|pending| (pending.query, pending.reply))
        .unzip();
    let queries = &*queries;
    let mut lease = Some(lease);
    let mut result = pin!(connections.retry(deadline, Repeat::Read, || {
        let lease = lease.take();
        let connections = &connections;
        async move {
            let mut lease = match lease {
                Some(lease) => lease,
                None => connections.acquire(deadline).await?,
            };
            Q::execute(&mut lease, deadline, queries).await
        }
    }));
    let result = match timeout(SLOW_AFTER, result.as_mut()).await {
        Ok(result) => result,
        Err(_) => {
            drop(fast_permit);
            result.await
        }
    };
    let mut rows = match result {
        Ok(rows) => rows.into_iter().peekable(),
        Err(error) => return fail(replies, &error),
    };
    for ((ordinal, query), reply) in (1_i64..).zip(queries).zip(replies) {
        let rows =
            std::iter::from_fn(|| rows.next_if(|row| row.get::<_, i64>("ordinal") == ordinal))
                .filter(|row| row.get::<_, Uuid>("user_id") == query.user_id())
                .collect();
        // A caller that has given up needs no rows.
        reply.send(Ok(rows)).ok();
    }
}

fn fail(replies: impl IntoIterator<Item = Reply>, error: &DbError) {
    for reply in replies {
        reply.send(Err(error.clone())).ok();
    }
}
