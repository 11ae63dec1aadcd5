//! The statements under `sql/`, named after their paths.

use futures_util::future::try_join_all;
use tokio_postgres::{Client, Statement};

macro_rules! statements {
    ($($name:ident = $path:literal,)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Sql { $(#[doc = $path] $name,)* }

        impl Sql {
            const SOURCES: &[&str] = &[$(include_str!(concat!("../../sql/", $path))),*];
        }
    };
}

statements! {
    DeletedTasksPurge = "deleted_tasks/purge.sql",
    IdempotencyKeysPurge = "idempotency_keys/purge.sql",
    IdempotencyKeysTrim = "idempotency_keys/trim.sql",
    LoginFailuresPurge = "login_failures/purge.sql",
    LoginFailuresRecord = "login_failures/record.sql",
    LoginNetworksPurge = "login_networks/purge.sql",
    MailRequestsCount = "mail_requests/count.sql",
    MailRequestsPurge = "mail_requests/purge.sql",
    PendingRegistrationsConfirm = "pending_registrations/confirm.sql",
    PendingRegistrationsPurge = "pending_registrations/purge.sql",
    PendingRegistrationsReplace = "pending_registrations/replace.sql",
    RevocationsSince = "revocations/since.sql",
    RevocationsPurge = "revocations/purge.sql",
    SessionsEnd = "sessions/end.sql",
    SessionsEndByRefreshToken = "sessions/end_by_refresh_token.sql",
    SessionsEndOthers = "sessions/end_others.sql",
    SessionsEndReused = "sessions/end_reused.sql",
    SessionsList = "sessions/list.sql",
    SessionsRefresh = "sessions/refresh.sql",
    SessionsRenew = "sessions/renew.sql",
    SessionsLogin = "sessions/login.sql",
    SessionsPurge = "sessions/purge.sql",
    TaskListsChanges = "task_lists/changes.sql",
    TaskListsRevisions = "task_lists/revisions.sql",
    TasksCount = "tasks/count.sql",
    TasksCreate = "tasks/create.sql",
    TasksCreateBatch = "tasks/create_batch.sql",
    TasksCreateIdempotent = "tasks/create_idempotent.sql",
    TasksCreateWithId = "tasks/create_with_id.sql",
    TasksDelete = "tasks/delete.sql",
    TasksDeleteBatch = "tasks/delete_batch.sql",
    TasksDeleteCompleted = "tasks/delete_completed.sql",
    TasksGetBatch = "tasks/get_batch.sql",
    TasksListNewest = "tasks/list_newest.sql",
    TasksListOldest = "tasks/list_oldest.sql",
    TasksListNewestBatch = "tasks/list_newest_batch.sql",
    TasksUpdate = "tasks/update.sql",
    TasksUpdateBatch = "tasks/update_batch.sql",
    UsersAccounts = "users/accounts.sql",
    UsersDelete = "users/delete.sql",
    UsersExport = "users/export.sql",
    UsersForLogin = "users/for_login.sql",
    UsersForMailToken = "users/for_mail_token.sql",
    UsersForPasswordCheck = "users/for_password_check.sql",
    UsersGet = "users/get.sql",
    UsersRegister = "users/register.sql",
    UsersSetDisabled = "users/set_disabled.sql",
    UsersSetEmail = "users/set_email.sql",
    UsersSetPassword = "users/set_password.sql",
}

/// Prepares all statements, which are then indexed by [`Sql`]. They are pipelined: opening a
/// connection costs one more round trip, not thirty.
pub(super) async fn prepare_all(client: &Client) -> Result<Vec<Statement>, tokio_postgres::Error> {
    try_join_all(Sql::SOURCES.iter().map(|text| client.prepare(text))).await
}
