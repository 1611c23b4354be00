//! One leader: a Lease, and a deadline by the local clock.
//!
//! The holder renews every few seconds and may write until [`HOLD`] after it *began* its last
//! successful renewal. Others take the lease only after they have watched it unchanged for [`LEASE`].
//! Since the first is shorter than the second, two never write at once, whatever their wall clocks
//! say: only the pace of the clocks must be about the same.
//!
//! Who is told to stop gives the lease back. Who was killed finds its own lease when the kubelet has started it again,
//! and takes it at once: a container of a pod is not started before the one in its place is gone.

use crate::config::{Config, MANAGER};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Others wait so long before they take a lease that is not renewed.
pub const LEASE: Duration = Duration::from_secs(15);
/// The holder counts on the lease for so long after it asked for it.
pub const HOLD: Duration = Duration::from_secs(10);
const RENEW_EVERY: Duration = Duration::from_secs(3);
const RETRY_EVERY: Duration = Duration::from_secs(2);
/// A renewal that takes longer is given up and tried again.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// The lease is not ours, or may soon not be.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("this operator is not the leader (any more): the write was left to the one that is")]
pub struct NotLeader;

/// Whether this process may write. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leadership {
    deadline: watch::Receiver<Option<Instant>>,
}

impl Leadership {
    /// Ask right before each write.
    pub fn check(&self) -> Result<(), NotLeader> {
        if self.is_held() { Ok(()) } else { Err(NotLeader) }
    }

    pub fn is_held(&self) -> bool {
        self.deadline.borrow().is_some_and(|deadline| Instant::now() < deadline)
    }

    /// Returns once the lease is ours.
    pub async fn acquired(&self) {
        let mut deadline = self.deadline.clone();
        // The sender lives as long as the elector; without one nobody leads.
        if deadline.wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns once the lease is no longer ours, by the local clock.
    pub async fn lost(&self) {
        let mut deadline = self.deadline.clone();
        loop {
            let held_until = *deadline.borrow_and_update();
            let Some(held_until) = held_until.filter(|until| Instant::now() < *until) else {
                return;
            };
            tokio::select! {
                biased;
                changed = deadline.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(held_until) => {}
            }
        }
    }

    /// A leadership that is held for a test.
    #[cfg(test)]
    pub fn for_tests(held_for: Duration) -> Self {
        let (sender, deadline) = watch::channel(Some(Instant::now() + held_for));
        drop(sender);
        Self { deadline }
    }
}

/// Strives for the lease until it is told to stop, and gives it back then.
pub struct Elector {
    leases: Api<Lease>,
    name: String,
    /// Of this life; the pod's lives have the beginning in common.
    identity: String,
    /// `None` outside of a pod, where two lives may overlap.
    lives: Option<String>,
    seen: Option<Seen>,
    deadline: watch::Sender<Option<Instant>>,
}

/// A state of the lease, and since when we have seen it.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    version: Option<String>,
    since: Instant,
}

#[derive(Debug, PartialEq)]
enum Claim {
    Create,
    /// It is ours, free, or has not been renewed in time.
    Replace,
    /// Another's.
    Wait,
}

impl Elector {
    /// `instance` makes two lives of one pod different holders.
    pub fn new(client: kube::Client, config: &Config, instance: &str) -> (Self, Leadership) {
        let (sender, deadline) = watch::channel(None);
        let lives = config.pod_uid.as_ref().map(|uid| format!("{}_{uid}_", config.pod_name));
        let elector = Self {
            leases: Api::namespaced(client, &config.namespace),
            name: config.lease.clone(),
            identity: format!("{}{instance}", lives.clone().unwrap_or_else(|| format!("{}_", config.pod_name))),
            lives,
            seen: None,
            deadline: sender,
        };
        (elector, Leadership { deadline })
    }

    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let began = Instant::now();
            let pause = match tokio::time::timeout(ANSWER_WITHIN, self.attempt(began)).await {
                Ok(Ok(true)) => RENEW_EVERY,
                Ok(Ok(false)) => RETRY_EVERY,
                Ok(Err(error)) => {
                    tracing::warn!(%error, lease = self.name, "the lease cannot be renewed");
                    RETRY_EVERY
                }
                Err(_) => {
                    tracing::warn!(lease = self.name, "no answer about the lease in time");
                    RETRY_EVERY
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.release().await;
    }

    /// Whether the lease is ours now.
    async fn attempt(&mut self, began: Instant) -> Result<bool, kube::Error> {
        let current = self.leases.get_opt(&self.name).await?;
        let held = match self.judge(current.as_ref(), began) {
            Claim::Wait => false,
            Claim::Create => self.written(self.leases.create(&PostParams::default(), &self.claim(None)).await)?,
            Claim::Replace => {
                let lease = self.claim(current);
                self.written(self.leases.replace(&self.name, &PostParams::default(), &lease).await)?
            }
        };
        // A lease that is another's ends ours at once; a failure to ask lets it run out.
        self.deadline.send_if_modified(|deadline| {
            let before = deadline.is_some();
            *deadline = held.then(|| began + HOLD);
            held || before
        });
        Ok(held)
    }

    /// Somebody else being faster is no error.
    fn written(&self, result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
        match result {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn judge(&mut self, lease: Option<&Lease>, now: Instant) -> Claim {
        let Some(lease) = lease else { return Claim::Create };
        let version = lease.metadata.resource_version.clone();
        let since = match &self.seen {
            Some(seen) if seen.version == version => seen.since,
            _ => now,
        };
        self.seen = Some(Seen { version, since });
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        let free = holder.is_none_or(str::is_empty);
        if free || holder.is_some_and(|holder| self.is_us(holder)) || now.duration_since(since) >= LEASE {
            Claim::Replace
        } else {
            Claim::Wait
        }
    }

    /// This life of the pod, or one before it.
    fn is_us(&self, holder: &str) -> bool {
        holder == self.identity || self.lives.as_ref().is_some_and(|lives| holder.starts_with(lives))
    }

    fn claim(&self, current: Option<Lease>) -> Lease {
        let mut lease = current.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some([("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        let now = MicroTime(Timestamp::now());
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            spec.holder_identity = Some(self.identity.clone());
            spec.acquire_time = Some(now.clone());
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.lease_duration_seconds = i32::try_from(LEASE.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    /// Lets the next leader start at once. By now nothing of ours writes any more.
    async fn release(&mut self) {
        let held = self.deadline.borrow().is_some_and(|until| Instant::now() < until);
        self.deadline.send_replace(None);
        if !held {
            return;
        }
        let given_back = async {
            let mut lease = self.leases.get(&self.name).await?;
            if let Some(spec) =
                lease.spec.as_mut().filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity))
            {
                spec.holder_identity = Some(String::new());
                self.leases.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match tokio::time::timeout(ANSWER_WITHIN, given_back).await {
            Ok(Ok(())) => tracing::info!(lease = self.name, "gave the lease back"),
            Ok(Err(error)) => tracing::warn!(%error, "could not give the lease back"),
            Err(_) => tracing::warn!("could not give the lease back in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elector() -> Elector {
        let config = crate::config::tests::sample();
        Elector::new(crate::testing::dead_client(), &config, "1").0
    }

    fn lease(holder: &str, version: &str) -> Lease {
        let mut lease = Lease::default();
        lease.metadata.resource_version = Some(version.to_owned());
        lease.spec = Some(LeaseSpec { holder_identity: Some(holder.to_owned()), ..LeaseSpec::default() });
        lease
    }

    #[test]
    fn holding_ends_before_others_may_take_the_lease() {
        assert!(HOLD + ANSWER_WITHIN < LEASE);
        assert!(RENEW_EVERY + ANSWER_WITHIN < HOLD);
    }

    #[tokio::test]
    async fn anothers_lease_is_taken_only_after_it_stood_still() {
        let mut elector = elector();
        let start = Instant::now();
        assert_eq!(elector.judge(None, start), Claim::Create);
        assert_eq!(elector.judge(Some(&lease("other", "1")), start), Claim::Wait);
        assert_eq!(elector.judge(Some(&lease("other", "2")), start + LEASE), Claim::Wait);
        assert_eq!(elector.judge(Some(&lease("other", "2")), start + LEASE + LEASE / 2), Claim::Wait);
        assert_eq!(elector.judge(Some(&lease("other", "2")), start + LEASE * 2), Claim::Replace);
        assert_eq!(elector.judge(Some(&lease("", "3")), start + LEASE * 2), Claim::Replace);
    }

    #[tokio::test]
    async fn a_life_of_the_same_pod_that_was_killed_is_succeeded_at_once() {
        let config = Config { pod_uid: Some("u1".to_owned()), ..crate::config::tests::sample() };
        let mut elector = Elector::new(crate::testing::dead_client(), &config, "2").0;
        assert_eq!(elector.judge(Some(&lease("operator-0_u1_1", "1")), Instant::now()), Claim::Replace);
        assert_eq!(elector.claim(None).spec.unwrap().holder_identity.as_deref(), Some("operator-0_u1_2"));
        // A namesake may still run on a node that nobody hears of.
        assert_eq!(elector.judge(Some(&lease("operator-0_u0_1", "2")), Instant::now()), Claim::Wait);
    }

    #[tokio::test]
    async fn outside_of_a_pod_another_life_is_another_holder() {
        let mut elector = elector();
        assert_eq!(elector.judge(Some(&lease("operator-0_1", "1")), Instant::now()), Claim::Replace);
        assert_eq!(elector.judge(Some(&lease("operator-0_2", "2")), Instant::now()), Claim::Wait);
    }

    #[tokio::test]
    async fn leadership_is_lost_by_the_local_clock_alone() {
        let leadership = Leadership::for_tests(Duration::from_millis(20));
        assert!(leadership.check().is_ok());
        leadership.lost().await;
    }

    #[test]
    fn a_lease_that_ran_out_permits_no_write() {
        assert!(Leadership::for_tests(Duration::ZERO).check().is_err());
    }
}
