//! The webhook's certificate, kept in the cluster: in a Secret, by a CA of its own that API servers are told to trust.
//!
//! [`plan`] says what follows from what the Secret holds, [`authority`] makes what is needed, [`objects`] asks the API
//! server. Each round reads both objects anew, so that whatever somebody else does to them is put right within one
//! round, and several replicas agree: whoever writes the Secret first wins, the others read what it wrote.

use std::{mem, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Secret;

use crate::{clock, inject::certificate::Certificate, metrics::Metrics};

use objects::{Failure, Objects};
use plan::{Holding, Plan, Publication};

mod authority;
mod objects;
mod plan;
#[cfg(test)]
mod tests;

/// How long to rest between two rounds.
const PERIOD: Duration = Duration::from_secs(30);

/// How long to rest after a failure: at first, and at most.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// So often the Secret is read again within a round while others write it too.
const ATTEMPTS: u32 = 5;

/// Where the certificate is kept, and for what it is.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    /// The namespace of the Secret and of the Service.
    pub(crate) namespace: String,
    pub(crate) secret: String,
    /// The MutatingWebhookConfiguration whose `caBundle` is kept.
    pub(crate) configuration: String,
    /// The Service by which API servers call the webhook.
    pub(crate) service: String,
    /// Other names or addresses, by which API servers call a webhook that has a URL.
    pub(crate) others: Vec<String>,
}

impl Names {
    /// The names that the certificate is for.
    fn in_certificate(&self) -> Vec<String> {
        let service = format!("{}.{}.svc", self.service, self.namespace);
        let full = format!("{service}.cluster.local");
        [service, full]
            .into_iter()
            .chain(self.others.iter().cloned())
            .collect()
    }
}

/// Keeps the certificate in the Secret, and the webhook configuration's `caBundle`, for as long as it is polled.
pub(crate) async fn keep(
    client: kube::Client,
    names: Names,
    certificate: Arc<Certificate>,
    metrics: Arc<Metrics>,
) {
    let mut keeper = Keeper {
        wanted: names.in_certificate(),
        objects: Objects::new(client, names),
        certificate,
        metrics,
        served: None,
        now: || clock::now_ms() / 1_000,
    };
    let mut trouble = Trouble::default();
    loop {
        let outcome = keeper.round().await;
        tokio::time::sleep(trouble.rest_after(outcome)).await;
    }
}

struct Keeper {
    objects: Objects,
    /// The names that the certificate must be for.
    wanted: Vec<String>,
    certificate: Arc<Certificate>,
    metrics: Arc<Metrics>,
    /// What is served at present.
    served: Option<authority::Leaf>,
    /// The time, in seconds since the Unix epoch.
    now: fn() -> u64,
}

impl Keeper {
    async fn round(&mut self) -> Result<(), Failure> {
        let now = (self.now)();
        let (secret, held) = self.settle(now).await?;
        self.serve(&held)?;
        self.publish(secret, &held, now).await
    }

    /// Reads the Secret, and writes it until there is nothing left to do.
    async fn settle(&mut self, now: u64) -> Result<(Secret, Holding), Failure> {
        let mut secret = self.objects.secret().await?;
        for _ in 0..ATTEMPTS {
            let data = objects::data(&secret);
            let held = Holding::read(&data, self.served.as_ref(), &self.wanted, now);
            let plan = held.plan(held.published(objects::mark(&secret), now), now);
            if plan == Plan::Keep {
                return Ok((secret, held));
            }
            let made = held.carried_out(&plan, &self.wanted, now);
            objects::put(&mut secret, made.map_err(Failure::Other)?);
            if matches!(plan, Plan::RenewLeaf(_) | Plan::RenewAll(_)) {
                objects::set_mark(&mut secret, None);
            }
            secret = match self.objects.replace(&secret).await {
                Ok(written) => {
                    self.tell(&plan);
                    written
                }
                // Another replica was faster.
                Err(Failure::Conflict) => self.objects.secret().await?,
                Err(failure) => return Err(failure),
            };
        }
        Err(Failure::Other(format!(
            "{} was written {ATTEMPTS} times and is still not as it should be; see who else writes it",
            self.objects.secret_name()
        )))
    }

    /// Says what was written.
    fn tell(&self, plan: &Plan) {
        let secret = self.objects.secret_name();
        match plan {
            Plan::Keep => {}
            Plan::PutBack(reason) => {
                tracing::warn!(secret, %reason, "wrote the webhook's certificate back");
            }
            Plan::RenewLeaf(reason) => {
                self.metrics.certificate_renewed("leaf");
                tracing::info!(secret, %reason, "renewed the webhook's certificate");
            }
            Plan::RenewAll(reason) => {
                self.metrics.certificate_renewed("authority");
                tracing::info!(secret, %reason, "made another CA for the webhook's certificate");
            }
            Plan::Retire => tracing::info!(secret, "left out a former CA of the webhook's certificate"),
        }
    }

    /// Gives the certificate to the server of the webhook.
    fn serve(&mut self, held: &Holding) -> Result<(), Failure> {
        let Some(leaf) = held.leaf() else {
            return Ok(());
        };
        let is_served = self.served.as_ref().is_some_and(|served| served.is_same(leaf));
        if !is_served {
            let taken = self.certificate.replace(&leaf.pem(), leaf.key_pem());
            taken.map_err(|problem| {
                let secret = self.objects.secret_name();
                Failure::Other(format!("the certificate in {secret} cannot be served: {problem}"))
            })?;
        }
        self.served = Some(leaf.clone());
        Ok(())
    }

    /// Has API servers trust the CAs.
    async fn publish(&self, mut secret: Secret, held: &Holding, now: u64) -> Result<(), Failure> {
        let configuration = self.objects.configuration().await?;
        let names = self.objects.names();
        let bundle = held.bundle();
        let ours = objects::our_webhooks(&configuration, names, &bundle);
        if ours.is_empty() {
            return Err(Failure::Other(format!(
                "{} has no webhook that calls the Service {}/{}, so that no pod gets an agent; correct its \
                 clientConfig.service, or --webhook-service",
                self.objects.configuration_name(),
                names.namespace,
                names.service
            )));
        }
        let outdated: Vec<String> = ours
            .into_iter()
            .filter_map(|(name, current)| (!current).then_some(name))
            .collect();
        let published = held.published(objects::mark(&secret), now);
        for act in held.publication(outdated.is_empty(), published) {
            match act {
                Publication::Unmark => secret = self.marked(secret, None).await?,
                Publication::Publish => {
                    self.objects.publish(&configuration, &outdated, &bundle).await?;
                    let configuration = self.objects.configuration_name();
                    tracing::info!(configuration, webhooks = ?outdated, "wrote caBundle");
                }
                // Counted from after the patch.
                Publication::Mark => secret = self.marked(secret, Some(held.mark((self.now)()))).await?,
            }
        }
        Ok(())
    }

    async fn marked(&self, mut secret: Secret, mark: Option<String>) -> Result<Secret, Failure> {
        objects::set_mark(&mut secret, mark);
        self.objects.replace(&secret).await
    }
}

/// What went wrong last, so that it is said once and tried again ever more slowly.
#[derive(Default)]
struct Trouble {
    said: String,
    wait: Duration,
}

impl Trouble {
    fn rest_after(&mut self, outcome: Result<(), Failure>) -> Duration {
        let problem = match outcome {
            Ok(()) => {
                self.wait = Duration::ZERO;
                if !mem::take(&mut self.said).is_empty() {
                    tracing::info!("the webhook's certificate is kept again");
                }
                return PERIOD;
            }
            // Nothing is wrong; what was read is old.
            Err(Failure::Conflict) => return FIRST_WAIT,
            Err(Failure::Other(problem)) => problem,
        };
        self.wait = self.wait.saturating_mul(2).clamp(FIRST_WAIT, LONGEST_WAIT);
        if self.said != problem {
            tracing::warn!(problem, "cannot keep the webhook's certificate; trying again");
            self.said = problem;
        }
        self.wait
    }
}
