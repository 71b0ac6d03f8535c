//! How likely each of some answers is, exactly, without generating any.

use std::collections::BTreeMap;

use crate::engine::guard;
use crate::memory::Start;
use crate::sampler::{Scratch, log_sum};
use crate::{AdapterId, Engine, LanguageModel, RequestError, Span, SubmitError, Wants};

/// Rows of logits that one pass gives at most, so that many options do not take much memory.
const ROWS_MAX: usize = 64;

/// The options as a tree of tokens: what they share is read once.
struct Tree {
    nodes: Vec<Node>,
}

struct Node {
    children: BTreeMap<u32, usize>,
    /// Of the way from the root to here.
    logprob: f64,
}

/// Tokens to be read from a node on, until the options part or end.
struct Chain {
    /// The nodes, all but the last with exactly one child.
    nodes: Vec<usize>,
    /// Their tokens, as far as something follows them.
    tokens: Vec<u32>,
    /// Index of the cache to start from, and the tokens of it that count.
    cache: usize,
    len: usize,
}

impl<M: LanguageModel> Engine<M> {
    /// The log-probability of each option as the continuation of `prompt`, under the bare
    /// distribution (temperature 1, no penalties). What the options share is read once, and the
    /// prompt not at all where it is known. Running requests wait meanwhile.
    ///
    /// An option is the tokens to be scored, with an end token if the end is to count; one without
    /// tokens has log-probability 0.
    pub fn score_options(
        &mut self,
        prompt: &[u32],
        options: &[Vec<u32>],
        adapter: Option<AdapterId>,
    ) -> Result<Vec<f64>, RequestError> {
        let longest = options.iter().map(Vec::len).max().unwrap_or(0);
        self.check_prompt(prompt, longest)?;
        let vocab = self.model.vocab();
        let unknown = |&&token: &&u32| token as usize >= vocab;
        if let Some(&token) = options.iter().flatten().find(unknown) {
            return Err(SubmitError::UnknownToken { token, vocab }.into());
        }
        let lora = self.in_use(adapter)?;
        let lora = lora.as_ref().map(|(_, adapter)| &**adapter);
        let mut tree = Tree::new();
        let ends: Vec<usize> = options.iter().map(|option| tree.add(option)).collect();

        // A request that is reading the same prompt is not waited for here.
        let start = self.start(adapter, prompt);
        let Start { cache, len, pin } = start.unwrap_or_else(|| Start {
            cache: self.model.new_cache(),
            len: 0,
            pin: None,
        });
        let mut rows = Vec::new();
        let mut caches = vec![cache];
        let result = self
            .read_prompt(&mut caches[0], &prompt[len..], lora, &mut rows)
            .and_then(|()| {
                let mut scratch = Scratch::default();
                tree.learn(0, &rows, &mut scratch)?;
                let mut chains = tree.chains(0, 0, prompt.len());
                while !chains.is_empty() {
                    chains =
                        self.read_chains(&mut tree, chains, &mut caches, lora, &mut scratch)?;
                }
                Ok(())
            });
        self.unpin(pin);
        result?;
        if self.config.prefix_bytes > 0 && prompt.len() >= self.config.prefix_min {
            let fork = |cache: &M::Cache, len| self.model.fork(cache, len);
            self.prefixes
                .insert(adapter, prompt, caches.swap_remove(0), fork);
        }
        Ok(ends.iter().map(|&end| tree.nodes[end].logprob).collect())
    }

    /// Reads a prompt in the usual pieces; the row after its last token.
    fn read_prompt(
        &mut self,
        cache: &mut M::Cache,
        tokens: &[u32],
        adapter: Option<&M::Adapter>,
        rows: &mut Vec<f32>,
    ) -> Result<(), RequestError> {
        let mut pieces = tokens.chunks(self.config.step_tokens).peekable();
        while let Some(tokens) = pieces.next() {
            let wants = if pieces.peek().is_some() {
                Wants::None
            } else {
                Wants::Last
            };
            let span = Span {
                cache: &mut *cache,
                tokens,
                wants,
                adapter,
            };
            guard(|| self.model.forward(&mut [span], rows))?;
        }
        Ok(())
    }

    /// Reads chains, a pass for as many as give a pass's worth of rows; the chains after them.
    fn read_chains(
        &mut self,
        tree: &mut Tree,
        chains: Vec<Chain>,
        caches: &mut Vec<M::Cache>,
        adapter: Option<&M::Adapter>,
        scratch: &mut Scratch,
    ) -> Result<Vec<Chain>, RequestError> {
        let vocab = self.model.vocab();
        let mut after = Vec::new();
        let mut left = chains.as_slice();
        let mut rows = Vec::new();
        while !left.is_empty() {
            let mut n_rows = 0;
            let fits = left.iter().take_while(|chain| {
                n_rows += chain.tokens.len();
                n_rows <= ROWS_MAX
            });
            let (now, later) = left.split_at(fits.count().max(1));
            left = later;
            let fork = |chain: &Chain| self.model.fork(&caches[chain.cache], chain.len);
            let mut forks: Vec<M::Cache> = now.iter().map(fork).collect();
            let mut spans: Vec<Span<'_, M>> = forks
                .iter_mut()
                .zip(now)
                .map(|(cache, chain)| Span {
                    cache,
                    tokens: &chain.tokens,
                    wants: Wants::Tail(chain.tokens.len()),
                    adapter,
                })
                .collect();
            guard(|| self.model.forward(&mut spans, &mut rows))?;
            let mut rows = rows.chunks_exact(vocab);
            for (chain, cache) in now.iter().zip(forks) {
                for (&node, row) in chain
                    .nodes
                    .iter()
                    .zip(rows.by_ref().take(chain.tokens.len()))
                {
                    tree.learn(node, row, scratch)?;
                }
                if let Some(&last) = chain.nodes.last() {
                    let len = chain.len + chain.tokens.len();
                    let next = tree.chains(last, caches.len(), len);
                    if !next.is_empty() {
                        caches.push(cache);
                        after.extend(next);
                    }
                }
            }
        }
        Ok(after)
    }
}

impl Tree {
    fn new() -> Self {
        let root = Node {
            children: BTreeMap::new(),
            logprob: 0.0,
        };
        Self { nodes: vec![root] }
    }

    /// The node where an option ends.
    fn add(&mut self, option: &[u32]) -> usize {
        let mut at = 0;
        for &token in option {
            let fresh = self.nodes.len();
            at = *self.nodes[at].children.entry(token).or_insert(fresh);
            if at == fresh {
                self.nodes.push(Node {
                    children: BTreeMap::new(),
                    logprob: 0.0,
                });
            }
        }
        at
    }

    /// Scores a node's children by the row after it.
    fn learn(
        &mut self,
        node: usize,
        row: &[f32],
        scratch: &mut Scratch,
    ) -> Result<(), RequestError> {
        let norm = log_sum(row, scratch);
        if norm.is_nan() {
            return Err(RequestError::NotFinite { at: 0 });
        }
        let before = self.nodes[node].logprob;
        let children = self.nodes[node].children.clone();
        for (token, child) in children {
            self.nodes[child].logprob = before + f64::from(row[token as usize]) - norm;
        }
        Ok(())
    }

    /// What must be read behind a node: a chain for each child that something follows.
    fn chains(&self, node: usize, cache: usize, len: usize) -> Vec<Chain> {
        let children = self.nodes[node].children.iter();
        let chain = |(&token, &child): (&u32, &usize)| {
            let (mut nodes, mut tokens, mut token) = (vec![child], Vec::new(), token);
            loop {
                let children = &self.nodes[nodes[nodes.len() - 1]].children;
                if children.is_empty() {
                    break;
                }
                tokens.push(token);
                match children.first_key_value() {
                    Some((&next, &child)) if children.len() == 1 => {
                        nodes.push(child);
                        token = next;
                    }
                    _ => break,
                }
            }
            Chain {
                nodes,
                tokens,
                cache,
                len,
            }
        };
        children
            .map(chain)
            .filter(|chain| !chain.tokens.is_empty())
            .collect()
    }
}
