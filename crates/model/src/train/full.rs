//! Every weight of a model as one flat vector: what full fine-tuning trains.

use crate::lora::{Fused, Proj};
use crate::weights::Model;
use bantam_kernels::{Compute, Real, ops};
use std::ops::Range;

/// Where one tensor lies in the flat vector, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FullTensor {
    /// As Hugging Face calls it.
    pub name: String,
    /// Rows; one for a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Whether it is a vector: a norm's gain or a bias.
    pub is_vector: bool,
    /// Place in the flat vector.
    pub range: Range<usize>,
}

/// The order of a model's tensors: the embedding, then by layer norm, attention, norm and MLP,
/// then the last norm and, where it is not tied, the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FullLayout {
    tensors: Vec<FullTensor>,
    n_params: usize,
    /// Weight and bias of each fused map.
    maps: Vec<[(usize, Option<usize>); 4]>,
    norms: Vec<[usize; 2]>,
    final_norm: usize,
    head: usize,
}

impl FullLayout {
    /// Every tensor, in order.
    pub fn tensors(&self) -> &[FullTensor] {
        &self.tensors
    }

    /// Length of the flat vector.
    pub fn n_params(&self) -> usize {
        self.n_params
    }

    pub(super) fn map(&self, layer: usize, fused: Fused) -> (usize, Option<usize>) {
        self.maps[layer][fused as usize]
    }

    pub(super) fn norms(&self, layer: usize) -> [usize; 2] {
        self.norms[layer]
    }

    pub(super) fn final_norm(&self) -> usize {
        self.final_norm
    }

    /// The head, which may be the embedding.
    pub(super) fn head(&self) -> usize {
        self.head
    }

    /// Adds the gradient of the first layer's input to the rows of the tokens, in their order.
    pub(super) fn add_embeddings<R: Real>(
        &self,
        compute: &Compute,
        d_params: &mut [R],
        d_x: &[R],
        tokens: &[u32],
    ) {
        let d = self.tensors[0].cols;
        for (&token, d_x) in tokens.iter().zip(d_x.chunks_exact(d)) {
            ops::add_assign(compute.isa(), &mut d_params[token as usize * d..][..d], d_x);
        }
    }

    fn push(&mut self, name: String, (rows, cols): (usize, usize), is_vector: bool) -> usize {
        let start = self.n_params;
        self.n_params += rows * cols;
        self.tensors.push(FullTensor {
            name,
            rows,
            cols,
            is_vector,
            range: start..self.n_params,
        });
        start
    }
}

impl<R: Real> Model<R> {
    /// The order in which [`Model::full_loss_and_grads`] writes gradients.
    pub fn full_layout(&self) -> FullLayout {
        let (config, d) = (&self.config, self.config.d_model);
        let mut layout = FullLayout {
            tensors: Vec::new(),
            n_params: 0,
            maps: Vec::new(),
            norms: Vec::new(),
            final_norm: 0,
            head: 0,
        };
        layout.push("model.embed_tokens.weight".into(), (config.vocab, d), false);
        for (i, layer) in self.layers.iter().enumerate() {
            let path = format!("model.layers.{i}");
            let mut norms = [0; 2];
            let mut maps = [(0, None); 4];
            for fused in Fused::ALL {
                // Norms stand before the maps that read them.
                let norm = match fused {
                    Fused::Qkv => Some((0, "input_layernorm")),
                    Fused::GateUp => Some((1, "post_attention_layernorm")),
                    Fused::O | Fused::Down => None,
                };
                if let Some((which, name)) = norm {
                    norms[which] = layout.push(format!("{path}.{name}.weight"), (1, d), true);
                }
                let mut push = |kind: &str, is_vector: bool| {
                    let start = layout.n_params;
                    for &proj in fused.projs() {
                        let (n_in, n_out) = Proj::dims(proj, config);
                        let shape = if is_vector { (1, n_out) } else { (n_out, n_in) };
                        layout.push(format!("{path}.{}.{kind}", proj.path()), shape, is_vector);
                    }
                    start
                };
                let weight = push("weight", false);
                let bias = layer.fused(fused).bias().map(|_| push("bias", true));
                maps[fused as usize] = (weight, bias);
            }
            layout.norms.push(norms);
            layout.maps.push(maps);
        }
        layout.final_norm = layout.push("model.norm.weight".into(), (1, d), true);
        if !config.tied_head {
            layout.head = layout.push("lm_head.weight".into(), (config.vocab, d), false);
        }
        layout
    }

    /// The weights as they are held now, in the order of `layout`.
    pub fn full_weights(&self, layout: &FullLayout) -> Vec<R> {
        let mut out = vec![R::ZERO; layout.n_params];
        let mut copy = |at: usize, values: &[R]| out[at..][..values.len()].copy_from_slice(values);
        copy(layout.final_norm, &self.final_norm);
        for (layer, norms) in self.layers.iter().zip(&layout.norms) {
            copy(norms[0], &layer.attn_norm);
            copy(norms[1], &layer.mlp_norm);
        }
        let mut maps = vec![(&self.embed, (0, None))];
        maps.extend(self.head.iter().map(|head| (head, (layout.head, None))));
        for (i, layer) in self.layers.iter().enumerate() {
            maps.extend(Fused::ALL.map(|fused| (layer.fused(fused), layout.map(i, fused))));
        }
        for (linear, (weight, bias)) in maps {
            for row in 0..linear.n_out {
                linear.row(&mut out[weight + row * linear.n_in..][..linear.n_in], row);
            }
            if let (Some(at), Some(bias)) = (bias, linear.bias()) {
                out[at..][..bias.len()].copy_from_slice(bias);
            }
        }
        out
    }

    /// Replaces every weight by `weights`, in the order of `layout`, rounded as the model holds
    /// them.
    ///
    /// Panics if there are not as many, or the model was not loaded for training.
    pub fn set_weights(&mut self, layout: &FullLayout, weights: &[R], compute: &Compute) {
        assert!(self.trainable, "the model was loaded for training");
        assert_eq!(weights.len(), layout.n_params, "one number per weight");
        let copy = |to: &mut [R], at: usize| to.copy_from_slice(&weights[at..][..to.len()]);
        copy(&mut self.final_norm, layout.final_norm);
        self.embed.set(compute, weights, None);
        if let Some(head) = &mut self.head {
            head.set(compute, &weights[layout.head..], None);
        }
        for (i, layer) in self.layers.iter_mut().enumerate() {
            copy(&mut layer.attn_norm, layout.norms[i][0]);
            copy(&mut layer.mlp_norm, layout.norms[i][1]);
            for fused in Fused::ALL {
                let (weight, bias) = layout.map(i, fused);
                let bias = bias.map(|at| &weights[at..]);
                layer
                    .fused_mut(fused)
                    .set(compute, &weights[weight..], bias);
            }
        }
    }
}
