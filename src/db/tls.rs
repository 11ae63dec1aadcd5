//! TLS to the database: how strictly the server's certificate is verified, and with which roots.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How strictly the server's certificate is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verification {
    /// No verification: `disable`, `allow` and `prefer`, which do not protect against an active
    /// attacker in any case.
    None,
    /// Verifies the chain but not the name: `verify-ca`.
    Chain,
    /// Verifies the chain and the name: `verify-full`, and `require`, which in libpq accepts any
    /// certificate.
    Full,
}

/// Creates the TLS configuration. Without `roots`, trusts the operating system's root certificates.
/// The error completes a sentence that begins with the variable's name.
pub(super) fn connector(
    verification: Verification,
    roots: Option<RootCertStore>,
) -> Result<MakeRustlsConnect, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let chain = match verification {
        Verification::None => None,
        Verification::Chain | Verification::Full => {
            let roots = Arc::new(roots.map_or_else(system_roots, Ok)?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
            let verifier = verifier.build();
            Some(verifier.map_err(|error| format!("cannot verify certificates: {error}"))?)
        }
    };
    let verifier: Arc<dyn ServerCertVerifier> = match (verification, chain) {
        (Verification::Full, Some(verifier)) => verifier,
        (_, chain) => Arc::new(RelaxedVerifier {
            chain,
            algorithms: provider.signature_verification_algorithms,
        }),
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("cannot use TLS: {error}"))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

/// Reads a file of root certificates. The error completes a sentence.
pub(crate) fn read_roots(path: &Path) -> Result<RootCertStore, String> {
    let read = || -> Result<RootCertStore, Box<dyn Error>> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(path)? {
            roots.add(certificate?)?;
        }
        match roots.is_empty() {
            true => Err("it contains no certificate".into()),
            false => Ok(roots),
        }
    };
    let path = path.display();
    read().map_err(|error| format!("names a file that cannot be used, {path}: {error}"))
}

fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    match roots.is_empty() {
        true => Err("requires TLS, but the system has no root certificates: install ca-certificates or set PGSSLROOTCERT".into()),
        false => Ok(roots),
    }
}

/// Skips the verification of the name, or of the whole chain. Signatures are always verified.
#[derive(Debug)]
struct RelaxedVerifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for RelaxedVerifier {
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
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
