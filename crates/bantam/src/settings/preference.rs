//! The settings of `bantam eval --metric preference`.

use std::path::PathBuf;

use anyhow::anyhow;
use bantam_model::Weights;

use super::work::SystemChoice;
use super::{count, threads};
use crate::args::{EvalArgs, MetricArg};
use crate::error::advise;

/// `bantam eval --metric preference`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PreferenceSettings {
    /// The model's name or path.
    pub(crate) model: String,
    /// Pairs.
    pub(crate) data: PathBuf,
    /// The system message for pairs without one.
    pub(crate) system: SystemChoice,
    /// Most pairs.
    pub(crate) limit: usize,
    /// Where each pair's scores go, if anywhere.
    pub(crate) rows_out: Option<PathBuf>,
    /// How weights are held.
    pub(crate) weights: Weights,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// End with one JSON object.
    pub(crate) json: bool,
}

impl PreferenceSettings {
    /// The settings, if this metric was asked for; flags that mean nothing to it are refused.
    pub(super) fn resolve(args: &EvalArgs) -> anyhow::Result<Option<Self>> {
        if args.metric != Some(MetricArg::Preference) {
            return Ok(None);
        }
        let meaningless = [
            ("--schema", args.schema.is_some()),
            ("--labels", args.labels.is_some()),
            ("--calibrate", args.calibrate),
            ("--against-f32", args.against_f32),
        ];
        if let Some((flag, _)) = meaningless.into_iter().find(|(_, given)| *given) {
            return Err(advise(
                anyhow!("preferences are judged by likelihood, so `{flag}` means nothing to them"),
                format!("leave out `{flag}`"),
            ));
        }
        Ok(Some(Self {
            model: args.model.clone(),
            data: args.data.clone(),
            system: SystemChoice::new(args.system.clone()),
            limit: count(args.limit),
            rows_out: args.rows_out.clone(),
            weights: args.weights.weights.into(),
            threads: threads(args.threads),
            json: args.json.json,
        }))
    }
}
