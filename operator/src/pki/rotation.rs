//! How one CA follows another without a moment in which anybody distrusts anybody.
//!
//! A new CA is *announced* long before the old one ends: the bundle holds both, while the old one goes on signing.
//! When every pod has had time to read that bundle, the new one signs, and servers show what it signed. The old one
//! stays in the bundle until nobody shows its certificates any more. Pure: the time comes in, what to store goes out.

use super::PkiError;
use super::authority::Authority;
use time::{Duration, OffsetDateTime};

/// A successor is announced when so much of a CA's life is over: a year before the end of one that lives ten.
const ANNOUNCE_AT: f64 = 0.9;
/// From its announcement until a CA signs. A kubelet needs two minutes to bring a changed bundle into a pod, and every
/// connection is made with the bundle as it is then; a day lets an operator be down in between.
pub const SPREAD: Duration = Duration::hours(24);
/// How long a former CA stays trusted. Servers show a new certificate within minutes; one that was down shows the old
/// one for a moment when it is back.
pub const FAREWELL: Duration = Duration::days(30);

/// The CAs of an installation.
#[derive(Clone)]
pub struct Succession {
    pub signing: Authority,
    pub announced: Option<Announced>,
    pub former: Option<Former>,
}

/// Trusted already; it will sign.
#[derive(Clone)]
pub struct Announced {
    pub authority: Authority,
    pub at: OffsetDateTime,
}

/// Trusted still; it signs no more.
#[derive(Clone)]
pub struct Former {
    pub certificate: String,
    pub replaced_at: OffsetDateTime,
}

impl Succession {
    pub fn begin(now: OffsetDateTime) -> Result<Self, PkiError> {
        Ok(Self { signing: Authority::generate(now)?, announced: None, former: None })
    }

    /// What everybody should trust now, as PEM.
    pub fn bundle(&self) -> String {
        let announced = self.announced.as_ref().map(|announced| announced.authority.certificate());
        let former = self.former.as_ref().map(|former| former.certificate.as_str());
        let all = [Some(self.signing.certificate()), announced, former];
        all.into_iter().flatten().map(|pem| format!("{}\n", pem.trim_end())).collect()
    }

    /// The succession after what is due at `now`; `None`: nothing is due.
    pub fn advance(&self, now: OffsetDateTime) -> Result<Option<Self>, PkiError> {
        let mut next = self.clone();
        next.forget_former(now);
        next.announce(now)?;
        next.promote(now);
        let same = next.signing.digest() == self.signing.digest()
            && next.announced.is_some() == self.announced.is_some()
            && next.former.is_some() == self.former.is_some();
        Ok((!same).then_some(next))
    }

    fn forget_former(&mut self, now: OffsetDateTime) {
        self.former.take_if(|former| now >= former.replaced_at + FAREWELL);
    }

    fn announce(&mut self, now: OffsetDateTime) -> Result<(), PkiError> {
        if self.announced.is_none() && self.signing.validity.spent(now) >= ANNOUNCE_AT {
            self.announced = Some(Announced { authority: Authority::generate(now)?, at: now });
        }
        Ok(())
    }

    /// A CA that has ended while no operator ran is replaced at once: what it signed is accepted by nobody anyhow.
    fn promote(&mut self, now: OffsetDateTime) {
        let over = now >= self.signing.validity.ends;
        if let Some(announced) = self.announced.take_if(|announced| over || now >= announced.at + SPREAD) {
            let former = std::mem::replace(&mut self.signing, announced.authority);
            self.former = Some(Former { certificate: former.certificate().to_owned(), replaced_at: now });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::authority::CA_DAYS;
    use super::super::testing::{accepts, date};
    use super::*;

    const LEAF_DAYS: i64 = 90;

    fn after(start: OffsetDateTime, days: i64) -> OffsetDateTime {
        start + Duration::days(days)
    }

    #[test]
    fn nothing_is_due_in_the_first_nine_tenths_of_a_cas_life() {
        let start = date(2026, 1, 1);
        let succession = Succession::begin(start).unwrap();
        assert!(succession.advance(after(start, CA_DAYS * 89 / 100)).unwrap().is_none());
        assert!(succession.advance(after(start, CA_DAYS * 91 / 100)).unwrap().is_some());
    }

    #[test]
    fn a_new_ca_is_trusted_for_a_day_before_it_signs() {
        let start = date(2026, 1, 1);
        let begun = Succession::begin(start).unwrap();
        let then = after(start, CA_DAYS * 91 / 100);
        let announced = begun.advance(then).unwrap().unwrap();
        assert_eq!(announced.signing.digest(), begun.signing.digest());
        assert_eq!(announced.bundle().matches("BEGIN CERTIFICATE").count(), 2);
        assert!(announced.advance(then + SPREAD - Duration::seconds(1)).unwrap().is_none());
        let replaced = announced.advance(then + SPREAD).unwrap().unwrap();
        assert_ne!(replaced.signing.digest(), begun.signing.digest());
        assert!(replaced.bundle().contains(begun.signing.certificate().trim_end()));
        let parted = replaced.advance(then + SPREAD + FAREWELL).unwrap().unwrap();
        assert_eq!(parted.bundle().matches("BEGIN CERTIFICATE").count(), 1);
        assert_eq!(parted.signing.digest(), replaced.signing.digest());
    }

    #[test]
    fn a_ca_that_ended_unattended_is_replaced_at_once() {
        let start = date(2026, 1, 1);
        let late = after(start, CA_DAYS + 100);
        let replaced = Succession::begin(start).unwrap().advance(late).unwrap().unwrap();
        assert!(replaced.signing.validity.ends > late);
        let leaf = replaced.signing.issue(&["a"], LEAF_DAYS, late).unwrap();
        assert!(accepts(&replaced.bundle(), &leaf, "a", late));
    }

    /// Thirty years, looked at every third of a day: a certificate of up to `LEAF_DAYS` ago that is still the one to
    /// show, or was until an hour ago, is accepted by whoever read the bundle at most half a day ago.
    #[test]
    fn over_thirty_years_no_client_meets_a_server_that_it_distrusts() {
        let start = date(2026, 1, 1);
        let step = Duration::hours(8);
        let mut succession = Succession::begin(start).unwrap();
        let mut leaf = succession.signing.issue(&["a"], LEAF_DAYS, start).unwrap();
        let (mut signer, mut issued, mut replaced) = (succession.signing.digest(), start, 0);
        let mut now = start;
        while now < after(start, 3 * CA_DAYS) {
            let (bundle_before, leaf_before) = (succession.bundle(), leaf.clone());
            now += step;
            let due = succession.advance(now).unwrap();
            let changed = due.is_some();
            succession = due.unwrap_or(succession);
            if signer != succession.signing.digest() || now - issued > Duration::days(60) {
                replaced += u32::from(signer != succession.signing.digest());
                leaf = succession.signing.issue(&["a"], LEAF_DAYS, now).unwrap();
                (signer, issued) = (succession.signing.digest(), now);
            }
            // Verifying is slow; where nothing changes there is nothing new to see.
            if changed || issued == now {
                assert!(accepts(&bundle_before, &leaf, "a", now), "an old bundle, a new certificate: {now}");
                assert!(accepts(&succession.bundle(), &leaf_before, "a", now), "a new bundle, an old one: {now}");
            }
        }
        assert!(replaced >= 3, "{replaced} successions in thirty years");
    }
}
