//! Limits on large responses. A client that does not read its responses can otherwise exhaust the
//! memory.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;
use uuid::Uuid;

use crate::db::Deadline;
use crate::db::keyed_semaphore::{KeyedPermit, KeyedSemaphore};
use crate::error::{Error, Result};
use crate::http::context::RequestContext;

/// A body that is larger than this needs a permit until it has been sent or dropped.
const LARGE_BODY: usize = 16 * 1024;
/// How many large responses may be sent at the same time. Each takes up to 1 MiB of memory.
const MAX_LARGE_RESPONSES: usize = 128;
/// The share of one network.
const MAX_PER_NETWORK: usize = MAX_LARGE_RESPONSES / 4;
/// How many lists of one user may be read from the database, or be large and not yet sent, at the
/// same time.
const MAX_PER_USER: usize = 4;

/// The permits for large responses.
pub(crate) struct LargeResponses {
    total: Arc<Semaphore>,
    networks: KeyedSemaphore<IpAddr>,
    users: KeyedSemaphore<Uuid>,
}

/// Permission to send one large response.
pub(crate) struct LargeResponsePermit {
    _user: Option<KeyedPermit<Uuid>>,
    _network: KeyedPermit<IpAddr>,
    _total: OwnedSemaphorePermit,
}

impl LargeResponses {
    pub(crate) fn new() -> Self {
        Self {
            total: Arc::new(Semaphore::new(MAX_LARGE_RESPONSES)),
            networks: KeyedSemaphore::new(MAX_PER_NETWORK),
            users: KeyedSemaphore::new(MAX_PER_USER),
        }
    }

    /// Calls `read` for the body of a response to a user, with a permit if it is large. Only then
    /// does the request depend on the clients that share its network or the service. While it waits
    /// for them it holds no body, so it reads again afterwards.
    pub(crate) async fn read<T: AsRef<[u8]>, F: Future<Output = Result<T>>>(
        &self,
        context: &RequestContext<'_>,
        user_id: Uuid,
        read: impl Fn() -> F,
    ) -> Result<(T, Option<LargeResponsePermit>)> {
        let of_user = self.users.acquire(user_id, context.deadline()).await?;
        let body = read().await?;
        if body.as_ref().len() <= LARGE_BODY {
            return Ok((body, None));
        }
        let (body, permit) = match self.try_acquire(context.network()) {
            Some(permit) => (body, permit),
            None => {
                drop(body);
                let permit = self.acquire(context.network(), context.deadline()).await?;
                (read().await?, permit)
            }
        };
        let permit = LargeResponsePermit {
            _user: Some(of_user),
            ..permit
        };
        Ok((body, Some(permit)))
    }

    /// Waits for a permit for a body of this size, if it needs one, that belongs to no user.
    pub(crate) async fn acquire_if_large(
        &self,
        context: &RequestContext<'_>,
        size: usize,
    ) -> Result<Option<LargeResponsePermit>> {
        if size <= LARGE_BODY {
            return Ok(None);
        }
        let permit = self.acquire(context.network(), context.deadline()).await?;
        Ok(Some(permit))
    }

    fn try_acquire(&self, network: IpAddr) -> Option<LargeResponsePermit> {
        Some(LargeResponsePermit {
            _user: None,
            _network: self.networks.try_acquire(network)?,
            _total: self.total.clone().try_acquire_owned().ok()?,
        })
    }

    async fn acquire(&self, network: IpAddr, deadline: Deadline) -> Result<LargeResponsePermit> {
        let of_network = self.networks.acquire(network, deadline).await?;
        match timeout_at(deadline.at(), self.total.clone().acquire_owned()).await {
            Ok(Ok(total)) => Ok(LargeResponsePermit {
                _user: None,
                _network: of_network,
                _total: total,
            }),
            _ => Err(Error::Overloaded),
        }
    }
}

impl LargeResponsePermit {
    /// Returns the body, which holds the permit until it has been sent or dropped.
    pub(crate) fn attach(self, body: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        struct PermitBody<B>(B, #[expect(dead_code)] LargeResponsePermit);
        impl<B: AsRef<[u8]>> AsRef<[u8]> for PermitBody<B> {
            fn as_ref(&self) -> &[u8] {
                self.0.as_ref()
            }
        }
        Bytes::from_owner(PermitBody(body, self))
    }
}
