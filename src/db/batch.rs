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
use std::sync::atomic::{AtomicBool, Ordering};
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
/// The maximum number of queries per kind that wait for the dispatcher. Callers wait while the
/// queue is full.
const QUEUE_CAPACITY: usize = 1024;

/// The error of the queries of a batch whose task panicked.
const BATCH_PANICKED: &str = "a batch of queries failed";

/// A query that can share a statement with others of its kind.
pub(super) trait BatchQuery: Sized + Send + Sync + 'static {
    /// Whether the query is a write, which is not repeated after its connection was lost.
    const IS_WRITE: bool = false;
    /// The maximum number of workers. Slow statements leave most of the pool to other requests.
    const MAX_WORKERS: usize = 8;
    /// The maximum number of rows that one statement returns, which bounds its memory.
    const MAX_ROWS: usize;

    /// The number of rows that this query counts as in a batch: at least the maximum that it
    /// returns. A higher number makes batches smaller.
    fn max_rows(&self) -> usize;

    /// The user whose rows the query reads or writes.
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
    /// Set by the first of two events: the query is sent, or its caller gives up.
    is_settled: Arc<AtomicBool>,
    reply: Reply,
}

type Reply = oneshot::Sender<Result<Vec<Row>>>;
type Permit = Option<OwnedSemaphorePermit>;

/// The queue to the dispatcher of one kind of query.
pub(super) struct Batcher<Q> {
    queue: Mutex<Option<mpsc::Sender<Pending<Q>>>>,
    /// Cloned by each query that is in progress, to count them.
    in_progress: Arc<()>,
}

impl<Q> Default for Batcher<Q> {
    fn default() -> Self {
        Self {
            queue: Mutex::new(None),
            in_progress: Arc::default(),
        }
    }
}

impl<Q> Batcher<Q> {
    /// Counts a query as in progress until the returned value is dropped. Also returns whether so few
    /// are in progress that a batch would contain this query alone.
    pub(super) fn begin(&self) -> (Arc<()>, bool) {
        let in_progress = self.in_progress.clone();
        let is_idle = Arc::strong_count(&in_progress) <= 1 + MAX_FAST_WORKERS;
        (in_progress, is_idle)
    }
}

impl<Q: BatchQuery> Batcher<Q> {
    /// Runs a query together with others and returns its rows. The outcome of a write is unknown only
    /// after `ConnectionLost`.
    pub(super) async fn submit(
        &self,
        connections: &Arc<Connections>,
        deadline: Deadline,
        query: Q,
    ) -> Result<Vec<Row>> {
        let (reply, mut response) = oneshot::channel();
        let is_settled = Arc::<AtomicBool>::default();
        let pending = Pending {
            query,
            deadline,
            is_settled: is_settled.clone(),
            reply,
        };
        let queue = self.queue(connections);
        let rows = async {
            // If the dispatcher is gone, so is the sender of the reply.
            queue.send(pending).await.ok();
            (&mut response).await
        };
        let rows = match timeout_at(deadline.at(), rows).await {
            Ok(rows) => rows,
            // A write that was sent is canceled at its deadline, and the outcome follows.
            Err(_) if Q::IS_WRITE && is_settled.swap(true, Ordering::Relaxed) => response.await,
            Err(_) => return Err(DbError::Unavailable("a query timed out".into())),
        };
        rows.unwrap_or_else(|_| match Q::IS_WRITE {
            true => Err(DbError::ConnectionLost(BATCH_PANICKED.into())),
            false => Err(DbError::Unavailable(BATCH_PANICKED.into())),
        })
    }

    /// Returns the queue of the running dispatcher. Starts a dispatcher on the first call, and
    /// again if the previous one has panicked.
    fn queue(&self, connections: &Arc<Connections>) -> mpsc::Sender<Pending<Q>> {
        let mut queue = self.queue.lock();
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
    let workers = Arc::new(Semaphore::new(Q::MAX_WORKERS));
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
                let batch = waiting.drain(..batch_size(&waiting));
                let batch =
                    batch.filter(|pending| !pending.is_settled.swap(true, Ordering::Relaxed));
                let batch = batch.collect();
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
    let repeat = match Q::IS_WRITE {
        true => Repeat::Never,
        false => Repeat::Read,
    };
    let mut result = pin!(connections.retry(deadline, repeat, || {
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
    let rows = match result {
        Ok(rows) => rows,
        Err(error) => return fail(replies, &error),
    };
    // Looked up once: comparing names for each row would take longer than reading the values.
    let position = |name| {
        let columns = rows.first().map_or(&[][..], Row::columns);
        columns.iter().position(|column| column.name() == name)
    };
    let (ordinals, owners) = (
        position("ordinal").unwrap_or(0),
        position("user_id").unwrap_or(0),
    );
    let mut rows = rows.into_iter().peekable();
    for ((ordinal, query), reply) in (1_i64..).zip(queries).zip(replies) {
        let rows =
            std::iter::from_fn(|| rows.next_if(|row| row.get::<_, i64>(ordinals) == ordinal))
                .filter(|row| row.get::<_, Uuid>(owners) == query.user_id())
                .collect();
        // A caller that has given up needs no rows.
        reply.send(Ok(rows)).ok();
    }
}

/// Collects one value of each query, which become an array parameter.
pub(super) fn column<'a, Q: 'a, T>(queries: &'a [Q], value: impl Fn(&'a Q) -> T) -> Vec<T> {
    queries.iter().map(value).collect()
}

fn fail(replies: impl IntoIterator<Item = Reply>, error: &DbError) {
    for reply in replies {
        reply.send(Err(error.clone())).ok();
    }
}
