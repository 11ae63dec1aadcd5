//! Limits on large responses. A client that does not read its responses can otherwise exhaust the
//! memory.

use std::net::IpAddr;

use bytes::Bytes;
use uuid::Uuid;

use crate::db::Deadline;
use crate::db::keyed_semaphore::{KeyedPermit, KeyedSemaphore};
use crate::error::Result;

/// A body that is larger than this needs a permit until it has been sent or dropped.
const LARGE_BODY: usize = 16 * 1024;
/// How many large responses may be sent at the same time. Each takes up to 1 MiB of memory.
const MAX_LARGE_RESPONSES: usize = 128;
/// The maximum number for one network.
const MAX_PER_NETWORK: usize = MAX_LARGE_RESPONSES / 4;
/// The maximum number of lists of one user that are being read from the database, or are large and
/// not yet sent.
const MAX_PER_USER: usize = 4;

/// A body, or the part of it that was read first.
pub(crate) trait ResponseBody {
    /// Whether the whole body needs a permit.
    fn is_large(&self) -> bool;
}

impl<T: AsRef<[u8]>> ResponseBody for T {
    fn is_large(&self) -> bool {
        self.as_ref().len() > LARGE_BODY
    }
}

/// The permits for large responses.
pub(crate) struct LargeResponses {
    total: KeyedSemaphore<()>,
    networks: KeyedSemaphore<IpAddr>,
    users: KeyedSemaphore<Uuid>,
}

/// Permission to send one large response.
pub(crate) struct LargeResponsePermit {
    _user: Option<KeyedPermit<Uuid>>,
    _network: KeyedPermit<IpAddr>,
    _total: KeyedPermit<()>,
}

impl LargeResponses {
    pub(crate) fn new() -> Self {
        Self {
            total: KeyedSemaphore::new(MAX_LARGE_RESPONSES),
            networks: KeyedSemaphore::new(MAX_PER_NETWORK),
            users: KeyedSemaphore::new(MAX_PER_USER),
        }
    }

    /// Calls `read` for the body of a response to a user, with a permit if it is large. Only large
    /// responses wait for permits, for which all users compete. A request that waits drops the
    /// body, and reads it again afterwards.
    pub(crate) async fn read<T: ResponseBody, F: Future<Output = Result<T>>>(
        &self,
        user_id: Uuid,
        network: IpAddr,
        deadline: Deadline,
        read: impl Fn() -> F,
    ) -> Result<(T, Option<LargeResponsePermit>)> {
        let of_user = self.users.acquire(user_id, deadline).await?;
        let mut body = read().await?;
        if !body.is_large() {
            return Ok((body, None));
        }
        let mut permit = self.try_acquire(network);
        if permit.is_none() {
            drop(body);
            permit = Some(self.acquire(network, deadline).await?);
            body = read().await?;
        }
        let permit = permit.map(|permit| LargeResponsePermit {
            _user: Some(of_user),
            ..permit
        });
        Ok((body, permit))
    }

    /// Waits for a permit if a body of this size needs one. The body belongs to no user.
    pub(crate) async fn acquire_if_large(
        &self,
        network: IpAddr,
        deadline: Deadline,
        size: usize,
    ) -> Result<Option<LargeResponsePermit>> {
        match size <= LARGE_BODY {
            true => Ok(None),
            false => self.acquire(network, deadline).await.map(Some),
        }
    }

    fn try_acquire(&self, network: IpAddr) -> Option<LargeResponsePermit> {
        Some(LargeResponsePermit {
            _user: None,
            _network: self.networks.try_acquire(network)?,
            _total: self.total.try_acquire(())?,
        })
    }

    async fn acquire(&self, network: IpAddr, deadline: Deadline) -> Result<LargeResponsePermit> {
        Ok(LargeResponsePermit {
            _user: None,
            _network: self.networks.acquire(network, deadline).await?,
            _total: self.total.acquire((), deadline).await?,
        })
    }
}

/// A body that holds a permit until it has been sent or dropped.
struct PermitBody(Bytes, #[expect(dead_code)] LargeResponsePermit);

impl AsRef<[u8]> for PermitBody {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Attaches a permit to a body. The body holds the permit until it has been sent or dropped.
pub(crate) fn attach_permit(body: Bytes, permit: Option<LargeResponsePermit>) -> Bytes {
    match permit {
        Some(permit) => Bytes::from_owner(PermitBody(body, permit)),
        None => body,
    }
}
