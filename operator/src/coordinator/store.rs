//! The record in the API server: a ConfigMap that belongs to the training, changed only by
//! compare-and-swap of its resource version.

use super::record::Record;
use crate::config::{MANAGER, TRAINING_LABEL};
use crate::leader::{Leadership, NotLeader};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the membership record {name} cannot be read or written: {source}")]
    Kube {
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error(
        "the membership record {name} holds no valid record ({source}): restore it, or delete the ConfigMap to start again from the newest checkpoint"
    )]
    Malformed {
        name: String,
        #[source]
        source: serde_json::Error,
    },
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
}

/// Outcome of a swap.
#[derive(Debug, PartialEq)]
pub enum Swap {
    Written,
    /// It had been changed: this is what it says now.
    Conflict(Option<Box<Record>>),
}

/// Where a membership keeps its record. Tests have one without Kubernetes.
#[async_trait]
pub trait RecordStore: Send {
    async fn read(&mut self) -> Result<Option<Record>, StoreError>;
    /// Writes if nobody has since we read or wrote last.
    async fn swap(&mut self, record: &Record) -> Result<Swap, StoreError>;
}

/// Of which training: its name, and its UID so that a namesake's record is not taken for ours.
#[derive(Clone, Debug)]
pub struct Owner {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub reference: OwnerReference,
}

pub struct ConfigMapStore {
    maps: Api<ConfigMap>,
    name: String,
    owner: Owner,
    leadership: Leadership,
    /// As we saw it last; absent: there was none.
    version: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    training_uid: String,
    record: Record,
}

impl ConfigMapStore {
    pub fn new(client: Client, owner: Owner, leadership: Leadership) -> Self {
        Self {
            maps: Api::namespaced(client, &owner.namespace),
            name: format!("{}-membership", owner.name),
            owner,
            leadership,
            version: None,
        }
    }

    fn failed(&self, source: kube::Error) -> StoreError {
        StoreError::Kube { name: format!("{}/{}", self.owner.namespace, self.name), source: Box::new(source) }
    }

    fn parse(&self, map: &ConfigMap) -> Result<Option<Record>, StoreError> {
        let Some(text) = map.data.as_ref().and_then(|data| data.get("record")) else {
            return Ok(None);
        };
        let envelope: Envelope = serde_json::from_str(text).map_err(|source| StoreError::Malformed {
            name: format!("{}/{}", self.owner.namespace, self.name),
            source,
        })?;
        Ok((envelope.training_uid == self.owner.uid).then_some(envelope.record))
    }

    fn map(&self, record: &Record) -> Result<ConfigMap, StoreError> {
        let envelope = Envelope { training_uid: self.owner.uid.clone(), record: record.clone() };
        let text = serde_json::to_string(&envelope)
            .map_err(|source| StoreError::Malformed { name: self.name.clone(), source })?;
        Ok(ConfigMap {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: self.version.clone(),
                owner_references: Some(vec![self.owner.reference.clone()]),
                labels: Some(
                    [
                        ("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned()),
                        (TRAINING_LABEL.to_owned(), self.owner.name.clone()),
                    ]
                    .into(),
                ),
                ..ObjectMeta::default()
            },
            data: Some([("record".to_owned(), text)].into()),
            ..ConfigMap::default()
        })
    }
}

#[async_trait]
impl RecordStore for ConfigMapStore {
    async fn read(&mut self) -> Result<Option<Record>, StoreError> {
        let map = self.maps.get_opt(&self.name).await.map_err(|error| self.failed(error))?;
        self.version = map.as_ref().and_then(|map| map.metadata.resource_version.clone());
        map.map_or(Ok(None), |map| self.parse(&map))
    }

    async fn swap(&mut self, record: &Record) -> Result<Swap, StoreError> {
        let map = self.map(record)?;
        self.leadership.check()?;
        let parameters = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        let written = match self.version {
            None => self.maps.create(&parameters, &map).await,
            Some(_) => self.maps.replace(&self.name, &parameters, &map).await,
        };
        match written {
            Ok(map) => {
                self.version = map.metadata.resource_version;
                Ok(Swap::Written)
            }
            // 404: it was deleted under us, which is a change like any other.
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => {
                Ok(Swap::Conflict(self.read().await?.map(Box::new)))
            }
            Err(error) => {
                // The answer may have been lost on its way back.
                if self.read().await?.as_ref() == Some(record) {
                    return Ok(Swap::Written);
                }
                Err(self.failed(error))
            }
        }
    }
}
