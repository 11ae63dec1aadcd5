//! `DATABASE_URL`: what libpq reads from it, with the TLS modes that tokio-postgres leaves out.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How much of the server's certificate must be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verification {
    /// Nothing: `disable`, `allow` and `prefer`, which promise nothing either way.
    None,
    /// The chain, not the name: `verify-ca`.
    Chain,
    /// All of it: `verify-full`, and `require` too, which in libpq would accept any certificate.
    Full,
}

/// A parsed `DATABASE_URL`.
#[derive(Clone)]
pub struct DatabaseUrl {
    config: tokio_postgres::Config,
    verification: Verification,
    root_certificates: Option<PathBuf>,
    mode: &'static str,
}

impl DatabaseUrl {
    /// Parses the URL. The error is the end of a sentence that begins with the variable's name,
    /// and holds nothing of the URL, which holds a password.
    pub fn parse(url: &str, root_certificates: Option<PathBuf>) -> Result<Self, String> {
        const TAKES: &str =
            "must be a URL like postgres://user:password@host/database?sslmode=require";
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(TAKES.into());
        }
        let (address, query) = url.split_once('?').unwrap_or((url, ""));
        let mut mode = "prefer";
        let mut root_certificates = root_certificates;
        let mut kept = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("sslmode", value)) => {
                    mode = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
                        .into_iter()
                        .find(|known| *known == value)
                        .ok_or("has an sslmode other than disable, allow, prefer, require, verify-ca or verify-full")?;
                }
                Some(("sslrootcert", path)) => {
                    let path = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
                    root_certificates = (path != "system").then(|| PathBuf::from(path.as_ref()));
                }
                _ => kept.push(pair),
            }
        }
        let mut config: tokio_postgres::Config = format!("{address}?{}", kept.join("&"))
            .parse()
            .map_err(|_| TAKES.to_owned())?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err("names no host".into());
        }
        let verification = match mode {
            "require" | "verify-full" => Verification::Full,
            "verify-ca" => Verification::Chain,
            _ => Verification::None,
        };
        config.ssl_mode(match mode {
            "disable" => SslMode::Disable,
            "allow" | "prefer" => SslMode::Prefer,
            _ => SslMode::Require,
        });
        if config.get_application_name().is_none() {
            config.application_name("todo-api");
        }
        // A peer that vanished without a word is noticed by the kernel, too.
        config.keepalives_idle(Duration::from_secs(30));
        config.keepalives_interval(Duration::from_secs(10));
        config.keepalives_retries(3);
        config.tcp_user_timeout(Duration::from_secs(15));
        Ok(Self {
            config,
            verification,
            root_certificates,
            mode,
        })
    }

    /// Where it leads, without a password: `host/database`.
    pub fn place(&self) -> String {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            #[cfg(unix)]
            Some(Host::Unix(path)) => path.display().to_string(),
            None => self
                .config
                .get_hostaddrs()
                .first()
                .map(ToString::to_string)
                .unwrap_or_default(),
        };
        format!(
            "{host}/{}",
            self.config
                .get_dbname()
                .or(self.config.get_user())
                .unwrap_or_default()
        )
    }

    /// The `sslmode` in force.
    pub fn mode(&self) -> &'static str {
        self.mode
    }

    /// What tokio-postgres connects with.
    pub fn config(&self) -> &tokio_postgres::Config {
        &self.config
    }

    /// What it speaks TLS with. The error is the end of a sentence about the URL.
    pub fn tls(&self) -> Result<MakeRustlsConnect, String> {
        tls(self.verification, self.root_certificates.as_deref())
    }
}

/// TLS for a unix socket, which has none.
pub fn no_tls() -> Result<MakeRustlsConnect, String> {
    tls(Verification::None, None)
}

fn tls(
    verification: Verification,
    root_certificates: Option<&std::path::Path>,
) -> Result<MakeRustlsConnect, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("cannot use TLS: {error}"))?;
    let config = if verification == Verification::None {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Lenient {
                chain: None,
                provider,
            }))
            .with_no_client_auth()
    } else {
        let roots = Arc::new(roots(root_certificates)?);
        let full = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| format!("cannot verify certificates: {error}"))?;
        match verification {
            Verification::Full => builder.with_webpki_verifier(full).with_no_client_auth(),
            _ => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Lenient {
                    chain: Some(full),
                    provider,
                }))
                .with_no_client_auth(),
        }
    };
    Ok(MakeRustlsConnect::new(config))
}

fn roots(file: Option<&std::path::Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(path) => {
            let unreadable = |error| {
                format!(
                    "has a root certificate file {} that cannot be read: {error}",
                    path.display()
                )
            };
            for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                let certificate = certificate.map_err(unreadable)?;
                roots.add(certificate).map_err(|error| {
                    format!(
                        "has a root certificate file {} that is no good: {error}",
                        path.display()
                    )
                })?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err("wants TLS, but there is no root certificate: install ca-certificates or set PGSSLROOTCERT".into());
    }
    Ok(roots)
}

/// Verifies less than everything, as `prefer` and `verify-ca` ask; signatures are always verified.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({})", self.place())
    }
}
