//! The routes of the API: which handler processes a method on a path, and with which guard.

use std::borrow::Cow;

use hyper::Method;
use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};
use crate::http::body::Body;
use crate::http::context::RequestContext;
use crate::http::cors::ALL_METHODS;
use crate::http::handlers::{account, auth, changes, mail, meta, sessions, static_files, tasks};
use crate::http::middleware::{authenticate, require_owner};
use crate::http::response::{self, Response};

/// Defines `dispatch`, which matches a request with the routes, and for tests `ROUTES`, which lists
/// them. The match arms, the `Allow` header and the route's label in metrics all come from here.
macro_rules! routes {
    (|$context:ident, $body:ident| $(
        [/ $($segment:tt)/ *] $(if let Some($bound:ident) = $option:expr =>)? {
            $($($method:ident)|+ => $handler:expr),+ $(,)?
        }
    )+) => {
        /// Runs the handler of the request's route.
        pub(crate) async fn dispatch(
            $context: &RequestContext<'_>,
            $body: Body<'_>,
        ) -> Result<Response> {
            let head = $context.head;
            let segments: Vec<Cow<str>> = split_path(head.uri.path()).collect();
            let segments: Vec<&str> = segments.iter().map(AsRef::as_ref).collect();
            match segments.as_slice() {
                // An empty segment is not a parameter.
                segments if segments.contains(&"") => Err(Error::NotFound),
                $([$(segment!(pattern $segment)),*] $(if let Some($bound) = $option)? => {
                    $context.set_route(path!($($segment)*));
                    match head.method {
                        $($(method!(pattern $method))|+ => $handler,)+
                        _ => options_or_405($context, allow!($($($method)+)+)),
                    }
                })+
                // RFC 9110 section 9.3.7: `OPTIONS *` is about the server as a whole.
                ["*"] if head.uri.path() == "*" => options_or_405($context, ALL_METHODS),
                _ => Err(Error::NotFound),
            }
        }

        #[cfg(test)]
        const ROUTES: &[(&str, &str)] = &[$((path!($($segment)*), allow!($($($method)+)+))),+];
    };
}

/// One segment of a route: a fixed text or a `{parameter}`.
#[rustfmt::skip]
macro_rules! segment {
    (pattern {$parameter:ident}) => { $parameter };
    (pattern $text:ident) => { stringify!($text) };
    (pattern $text:literal) => { $text };
    (path {$parameter:ident}) => { concat!("/{", stringify!($parameter), "}") };
    (path $text:ident) => { concat!("/", stringify!($text)) };
    (path $text:literal) => { concat!("/", $text) };
}

/// The text of a route's path.
macro_rules! path {
    () => { "/" };
    ($($segment:tt)+) => { concat!($(segment!(path $segment)),+) };
}

/// A method of a route. hyper omits the body of a response to HEAD.
#[rustfmt::skip]
macro_rules! method {
    (pattern GET) => { Method::GET | Method::HEAD };
    (pattern $method:ident) => { Method::$method };
    (allow GET) => { "GET, HEAD, " };
    (allow $method:ident) => { concat!(stringify!($method), ", ") };
}

/// The value of a route's `Allow` header.
macro_rules! allow {
    ($($method:ident)+) => { concat!($(method!(allow $method),)+ "OPTIONS") };
}

routes! { |context, body|
    [/] { GET => Ok(response::redirect("docs")) }
    [/healthz] { GET => meta::healthz() }
    [/readyz] { GET => meta::readyz(context).await }
    [/"openapi.json"] { GET => static_files::openapi(context).await }
    [/docs] { GET => Ok(meta::docs(context)) }
    [/docs/{file}] { GET => static_files::docs_file(context, file).await }
    [/account/reset] if let Some(_mailer) = &context.app.mail => { GET => Ok(meta::account(context)) }
    [/account/verify] if let Some(_mailer) = &context.app.mail => { GET => Ok(meta::account(context)) }
    [/problems/{code}] { GET => meta::problem(context, code) }
    [/api/v1/auth/register] { POST => auth::register(context, body).await }
    [/api/v1/auth/login] { POST => auth::login(context, body).await }
    [/api/v1/auth/refresh] { POST => auth::refresh(context, body).await }
    [/api/v1/auth/logout] { POST => auth::logout(context, body).await }
    [/api/v1/auth/me] {
        GET => account::me(context, authenticate(context).await?).await,
        DELETE => account::delete_me(context, authenticate(context).await?, body).await,
    }
    [/api/v1/auth/password] {
        PUT => account::change_password(context, authenticate(context).await?, body).await,
    }
    [/api/v1/auth/password/forgot] if let Some(mailer) = &context.app.mail => {
        POST => mail::forgot_password(mailer, body).await,
    }
    [/api/v1/auth/password/reset] if let Some(mailer) = &context.app.mail => {
        POST => mail::reset_password(context, mailer, body).await,
    }
    [/api/v1/auth/email] if let Some(mailer) = &context.app.mail => {
        PUT => mail::change_email(context, mailer, authenticate(context).await?, body).await,
    }
    [/api/v1/auth/email/verify] if let Some(mailer) = &context.app.mail => {
        POST => mail::verify_email(context, mailer, body).await,
    }
    [/api/v1/auth/email/resend] if let Some(mailer) = &context.app.mail => {
        POST => mail::resend(mailer, body).await,
    }
    [/api/v1/auth/sessions] {
        GET => sessions::list(context, authenticate(context).await?).await,
        DELETE => sessions::end_others(context, authenticate(context).await?).await,
    }
    [/api/v1/auth/sessions/{id}] {
        DELETE => sessions::end(context, authenticate(context).await?, id).await,
    }
    [/api/v1/{user_id}/changes] {
        GET => changes::list(context, require_owner(context, user_id).await?).await,
    }
    [/api/v1/{user_id}/tasks] {
        GET => tasks::list(context, require_owner(context, user_id).await?).await,
        POST => tasks::create(context, require_owner(context, user_id).await?, body).await,
        DELETE => tasks::delete_completed(context, require_owner(context, user_id).await?).await,
    }
    [/api/v1/{user_id}/tasks/{id}] {
        GET => tasks::get(context, require_owner(context, user_id).await?, id).await,
        PUT => tasks::put(context, require_owner(context, user_id).await?, id, body).await,
        PATCH => tasks::update(context, require_owner(context, user_id).await?, id, body).await,
        DELETE => tasks::delete(context, require_owner(context, user_id).await?, id).await,
    }
    [/api/v1/{user_id}/tasks/{id}/complete] {
        PATCH => tasks::complete(context, require_owner(context, user_id).await?, id, body).await,
    }
}

fn options_or_405(context: &RequestContext<'_>, allow: &'static str) -> Result<Response> {
    match context.head.method {
        Method::OPTIONS => Ok(response::options(allow)),
        _ => Err(Error::MethodNotAllowed(allow)),
    }
}

/// Splits a path into segments, ignoring a slash at the end. Each segment is percent-decoded
/// separately, so that `%2F` does not split. A segment that is not UTF-8 stays encoded and matches
/// no route.
fn split_path(path: &str) -> impl Iterator<Item = Cow<'_, str>> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let path = path.strip_suffix('/').unwrap_or(path);
    let segments = (!path.is_empty()).then(|| path.split('/'));
    segments.into_iter().flatten().map(|segment| {
        let decoded = percent_decode_str(segment).decode_utf8();
        decoded.unwrap_or(Cow::Borrowed(segment))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::Value;

    use super::*;

    #[test]
    fn routes_match_the_openapi_document() {
        let document: Value = serde_json::from_str(include_str!("../openapi.json")).unwrap();
        let paths = document["paths"].as_object().unwrap();
        let documented = paths.iter().map(|(path, item)| {
            let keys = item.as_object().unwrap().keys();
            let methods = keys.map(|key| key.to_uppercase());
            let methods = methods.filter(|key| ALL_METHODS.split(", ").any(|name| name == key));
            (path.as_str(), methods.collect())
        });
        let routed = ROUTES.iter().map(|(path, allow)| {
            let methods = allow
                .split(", ")
                .filter(|name| !["HEAD", "OPTIONS"].contains(name));
            (*path, methods.map(str::to_owned).collect())
        });
        type Routes<'a> = BTreeMap<&'a str, BTreeSet<String>>;
        assert_eq!(routed.collect::<Routes>(), documented.collect::<Routes>());
    }
}
