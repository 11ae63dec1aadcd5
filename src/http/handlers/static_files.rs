//! The files of the pages. Each is compressed once, when a client first accepts gzip.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::LazyLock;

use bytes::Bytes;
use flate2::{Compression, GzBuilder};
use hyper::StatusCode;
use hyper::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, HeaderMap, HeaderValue, VARY,
};
use swagger_ui_redist::SwaggerUi;
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;

use crate::error::{Error, Result};
use crate::http::context::RequestContext;
use crate::http::large_responses::attach_permit;
use crate::http::response::{self, Response};

pub(super) const OPENAPI: &str = include_str!("../../openapi.json");
const OWN_FILES: [(&str, &str); 4] = [
    ("init.js", include_str!("../../docs/init.js")),
    ("docs.css", include_str!("../../docs/docs.css")),
    ("account.js", include_str!("../../docs/account.js")),
    ("account.css", include_str!("../../docs/account.css")),
];

struct StaticFile {
    content_type: &'static str,
    data: &'static [u8],
    gzip: OnceCell<Bytes>,
}

impl StaticFile {
    fn new(content_type: &'static str, data: &'static [u8]) -> Self {
        Self {
            content_type,
            data,
            gzip: OnceCell::new(),
        }
    }

    /// Compresses the file on a blocking thread, or returns the result of an earlier call.
    async fn gzip(&'static self) -> Result<Bytes> {
        let compress = || {
            let mut compressed = Vec::new();
            let mut encoder = GzBuilder::new().buf_read(self.data, Compression::best());
            encoder.read_to_end(&mut compressed)?;
            Ok(compressed.into())
        };
        let run = async || spawn_blocking(compress).await?;
        let gzip: io::Result<_> = self.gzip.get_or_try_init(run).await.cloned();
        gzip.map_err(|error| Error::Internal(format!("cannot compress: {error}")))
    }

    async fn respond(&'static self, context: &RequestContext<'_>) -> Result<Response> {
        let is_text = self.content_type != PNG;
        let is_compressed = is_text && accepts_gzip(&context.head.headers);
        let body = match is_compressed {
            true => self.gzip().await?,
            false => Bytes::from_static(self.data),
        };
        let large_responses = &context.app.large_responses;
        let (network, deadline) = (context.network(), context.deadline());
        let permit = large_responses.acquire_if_large(network, deadline, body.len());
        let body = attach_permit(body, permit.await?);
        let mut response = response::bytes(StatusCode::OK, self.content_type, body);
        let headers = response.headers_mut();
        if is_text {
            headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
        }
        if is_compressed {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        Ok(response)
    }
}

/// `GET /openapi.json`
pub(crate) async fn openapi(context: &RequestContext<'_>) -> Result<Response> {
    static FILE: LazyLock<StaticFile> =
        LazyLock::new(|| StaticFile::new("application/json", OPENAPI.as_bytes()));
    FILE.respond(context).await
}

/// `GET /docs/{file}`: the files of Swagger UI, and the scripts and style sheets of the pages.
pub(crate) async fn docs_file(context: &RequestContext<'_>, file: &str) -> Result<Response> {
    static FILES: LazyLock<HashMap<&'static str, StaticFile>> = LazyLock::new(|| {
        let own = OWN_FILES.map(|(name, text)| (name, text.as_bytes()));
        let swagger_ui = SwaggerUi::static_files().iter();
        own.into_iter()
            .chain(swagger_ui.map(|(file, data)| (file.file_name(), &data[..])))
            .filter_map(|(name, data)| Some((name, StaticFile::new(content_type(name)?, data))))
            .collect()
    });
    let file = FILES.get(file).ok_or(Error::NotFound)?;
    let mut response = file.respond(context).await?;
    let max_age = HeaderValue::from_static("max-age=3600");
    response.headers_mut().insert(CACHE_CONTROL, max_age);
    Ok(response)
}

const PNG: &str = "image/png";

fn content_type(file: &str) -> Option<&'static str> {
    match file.rsplit('.').next()? {
        "css" => Some("text/css; charset=utf-8"),
        "js" => Some("text/javascript; charset=utf-8"),
        "png" => Some(PNG),
        _ => None,
    }
}

/// Whether the client accepts gzip (RFC 9110 section 12.5.3). A weight of 0 means that it does not;
/// `*` stands for the codings that are not listed.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(ACCEPT_ENCODING).iter();
    let codings = lines.flat_map(|line| line.to_str().unwrap_or_default().split(','));
    let (mut gzip, mut any) = (None, false);
    for coding in codings {
        let mut parts = coding.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
        let accepted = weight.is_none_or(|q| q.parse().is_ok_and(|q: f32| q > 0.0));
        match name.to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => gzip = Some(gzip.unwrap_or(false) || accepted),
            "*" => any = accepted,
            _ => {}
        }
    }
    gzip.unwrap_or(any)
}
