"""Pairs of texts and their scores by the reference implementations.

    pip install sacrebleu==2.6.0 rouge-score==0.1.2 nltk==3.10.4 rapidfuzz==3.14.6
    python make.py > pairs.json

The texts are made from a small vocabulary by a seeded generator: a reference, and an answer that keeps, drops, doubles,
swaps and bends its words, with numbers, signs, entities and other scripts among them.
"""

import json
import random

import nltk
import rapidfuzz
import sacrebleu
from nltk.stem.porter import PorterStemmer
from nltk.translate.gleu_score import sentence_gleu
from nltk.translate.meteor_score import single_meteor_score
from rouge_score import rouge_scorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

WORDS = """the a of and to in is was that it for on with as his he be at by had not are but from or have an they
which one you were her all she there would their we him been has when who will more no if out so said what up its
about into than them can only other new some could time these two may then do first any my now such like our over man
running runs runner happily happiness relational relation conditional conditioned agreements agreed flies flying skies
dying lies organization organizations organizing controlled controlling national rationally electricity electrical
argument arguments geology apologies enjoyment enjoying hopping hoping filing failed 3.5 1,000 2026 no-one U.S. it's
"quoted" (aside) 50% a/b x=1 café naïve Zürich Straße привет мир 東京 &amp; &quot; <skipped> don't e.g. 10-20 end. yes, why? wow!
""".split()


class NoWordNet:
    def synsets(self, word):
        return []


def answer_of(rng, reference):
    out = []
    for word in reference:
        roll = rng.random()
        if roll < 0.60:
            out.append(word)
        elif roll < 0.72:
            out.append(rng.choice(WORDS))
        elif roll < 0.80:
            out.extend([word, word])
        elif roll < 0.86:
            out.append(word.upper())
        elif roll < 0.92:
            out.append(word + rng.choice(["s", "ed", "ing", ",", ".", "-"]))
    if rng.random() < 0.4 and len(out) > 3:
        cut = rng.randrange(len(out))
        out = out[cut:] + out[:cut]
    return out


def main():
    rng = random.Random(20)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rouge3", "rouge4", "rouge5", "rougeL"], use_stemmer=False)
    tokenize = Tokenizer13a()
    pairs = [("", ""), ("", "a word"), ("a word", ""), ("...", "!?"), ("same text here", "same text here")]
    while len(pairs) < 240:
        n = rng.choice([1, 2, 3, 5, 8, 13, 21, 34])
        reference = [rng.choice(WORDS) for _ in range(n)]
        glue = rng.choice([" ", " ", " ", "\n", "  "])
        pairs.append((glue.join(answer_of(rng, reference)), " ".join(reference)))
    rows = []
    for answer, reference in pairs:
        hyp, ref = tokenize(answer.rstrip()).split(), tokenize(reference.rstrip()).split()
        rouge = scorer.score(reference, answer)
        scores = {
            "fuzzy_match": rapidfuzz.fuzz.ratio(answer, reference) / 100,
            "bleu": sacrebleu.sentence_bleu(answer, [reference]).score / 100,
            "gleu": sentence_gleu([ref], hyp),
            "meteor": single_meteor_score(ref, hyp, wordnet=NoWordNet()),
        }
        for key, name in [(f"rouge{n}", f"rouge_{n}") for n in range(1, 6)] + [("rougeL", "rouge_l")]:
            scores[name] = rouge[key].fmeasure
        rows.append({"answer": answer, "reference": reference, "scores": scores})
    stemmer = PorterStemmer()
    vocabulary = sorted({word.lower() for pair in pairs for text in pair for word in tokenize(text).split()} | set(STEMS))
    stems = {word: stemmer.stem(word) for word in vocabulary}
    versions = {"sacrebleu": sacrebleu.__version__, "nltk": nltk.__version__, "rapidfuzz": rapidfuzz.__version__}
    print(json.dumps({"versions": versions, "pairs": rows, "stems": stems}, ensure_ascii=False, indent=0))


STEMS = """caresses ponies ties cats feed agreed plastered bled motoring sing conflated troubled sized hopping tanned
falling hissing fizzed failing filing happy sky rational valenci hesitanci digitizer conformabli radicalli differentli
vileli analogousli vietnamization predication operator feudalism decisiveness hopefulness callousness formaliti
sensitiviti sensibiliti triplicate formative formalize electriciti electrical hopeful goodness revival allowance
inference airliner gyroscopic adjustable defensible irritant replacement adjustment dependent adoption homologou
communism activate angulariti homologous effective bowdlerize probate rate cease controll roll died spied die tied
owing owed used using ate eyes yyyy syzygy toy ion nation fully hopefully finally traditionally conditionally apology
analogically is as by be us""".split()

main()
