//! A certificate authority, and the certificates that it signs.

use super::PkiError;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};

/// How long a CA of ours lives.
pub const CA_DAYS: i64 = 3650;
/// Nodes' clocks differ.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// PEM texts of a certificate and its key.
#[derive(Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

/// When a certificate holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub begins: OffsetDateTime,
    pub ends: OffsetDateTime,
}

impl Validity {
    /// That of the first certificate in a PEM text.
    pub fn of(pem: &str) -> Result<Self, PkiError> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| PkiError::UnreadableCertificate(error.to_string()))?;
        let unreadable = |detail: String| PkiError::UnreadableCertificate(detail);
        let (_, certificate) =
            x509_parser::parse_x509_certificate(&der).map_err(|error| unreadable(error.to_string()))?;
        let time =
            |seconds| OffsetDateTime::from_unix_timestamp(seconds).map_err(|error| unreadable(error.to_string()));
        let validity = certificate.validity();
        Ok(Self { begins: time(validity.not_before.timestamp())?, ends: time(validity.not_after.timestamp())? })
    }

    /// The share of its life that is over.
    pub fn spent(&self, now: OffsetDateTime) -> f64 {
        let life = (self.ends - self.begins).as_seconds_f64();
        if life > 0.0 { (now - self.begins).as_seconds_f64() / life } else { 1.0 }
    }
}

/// A CA with its key.
#[derive(Clone)]
pub struct Authority {
    identity: Identity,
    pub validity: Validity,
}

impl Authority {
    /// Makes a new CA.
    pub fn generate(now: OffsetDateTime) -> Result<Self, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = parameters(&[], CA_DAYS, now)?;
        // Bundles hold several: a name of its own tells them apart where people look.
        params.distinguished_name.push(DnType::CommonName, format!("vicuna-operator CA {}", now.date()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self::of(Identity { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
    }

    /// A CA that was made before, or that an administrator has provided.
    pub fn of(identity: Identity) -> Result<Self, PkiError> {
        Ok(Self { validity: Validity::of(&identity.certificate)?, identity })
    }

    pub fn certificate(&self) -> &str {
        &self.identity.certificate
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A server's certificate for these names.
    pub fn issue(&self, names: &[&str], days: i64, now: OffsetDateTime) -> Result<Identity, PkiError> {
        let issuer = Issuer::from_ca_cert_pem(self.certificate(), KeyPair::from_pem(&self.identity.key)?)?;
        let key = KeyPair::generate()?;
        let mut params = parameters(names, days, now)?;
        params.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or_default());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        Ok(Identity { certificate: params.signed_by(&key, &issuer)?.pem(), key: key.serialize_pem() })
    }

    /// Tells which CA signed something.
    pub fn digest(&self) -> String {
        hex::encode(&Sha256::digest(self.certificate().as_bytes())[..16])
    }
}

fn parameters(names: &[&str], days: i64, now: OffsetDateTime) -> Result<CertificateParams, rcgen::Error> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names)?;
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + Duration::days(days);
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{accepts, date};
    use super::*;

    #[test]
    fn clients_accept_our_names_from_our_ca_only() {
        let now = date(2026, 1, 1);
        let authority = Authority::generate(now).unwrap();
        let identity = authority.issue(&["vicuna-operator", "vicuna-operator.ns.svc"], 90, now).unwrap();
        assert!(accepts(authority.certificate(), &identity, "vicuna-operator", now));
        assert!(accepts(authority.certificate(), &identity, "vicuna-operator.ns.svc", now));
        assert!(!accepts(authority.certificate(), &identity, "vicuna-gateway", now));
        let other = Authority::generate(now).unwrap();
        assert!(!accepts(other.certificate(), &identity, "vicuna-operator", now));
    }

    #[test]
    fn an_expired_certificate_is_not_accepted() {
        let now = date(2026, 1, 1);
        let authority = Authority::generate(now).unwrap();
        let identity = authority.issue(&["vicuna-operator"], 90, now).unwrap();
        let after = |days| accepts(authority.certificate(), &identity, "vicuna-operator", now + Duration::days(days));
        assert!(after(89));
        assert!(!after(91));
    }

    #[test]
    fn a_certificates_life_is_read_from_itself() {
        let now = date(2026, 1, 1);
        let authority = Authority::generate(now).unwrap();
        assert_eq!(authority.validity.begins, now - CLOCK_SKEW);
        assert_eq!(authority.validity.ends, now + Duration::days(CA_DAYS));
        assert!(authority.validity.spent(now) < 0.001);
        assert!(authority.validity.spent(now + Duration::days(CA_DAYS)) > 0.999);
        assert!(Validity::of("no certificate").is_err());
    }
}
