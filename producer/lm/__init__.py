"""How are the activations of a language model read?

Any Hugging Face decoder or encoder is loaded as far as the last hook, and its blocks and hooks are located by rule and
by probing rather than by the name of its class. In reading order:

    model        LanguageModel: activations, logits with activations replaced, limits; what callers use
    loading      load_language_model: the stages below one after the other, on a number format and a device
    errors       ModelError, and the sentences that several stages share
    precision    the number format that is fastest on this machine; deterministic algorithms
    weights      which weights are loaded: the structure of a model, its parts, numbers of what is not loaded
    pretrained   a model and its tokenizer, from a folder or the hub: the whole, or what hooks need of it
    revisions    checkpoints of a model under training: which are there, and the settings that load one
    gguf         GGUF files as models, and as Hugging Face folders
    limits       vocabulary, longest window, the windows that models are probed with
    hooks        hook points; reading and replacing the input or output of a module
    blocks       the chain of blocks inside the model, and the cut after the last hook
    anatomy      attn_out, resid_mid, mlp_in and mlp_out inside one block, located by experiment
    attention    z, q, k and v of the attention inside one block, located by experiment
    locations    the module that each hook name of the settings refers to
    self_check   the whole model's activations beside the cut model's; causality, padding, overflow
    network      the hooked network that runs passes, from several threads at the same time
    passes       passes over windows of text, with activations recorded and replaced
    unembedding  the final norm and the head, as a linear map

The data moves through the stages in typed pieces that no later stage changes: ModelLayout, PretrainedModel, BlockChain,
HookLocation, Observation, HookPoint, SelfCheck, HookedNetwork, LanguageModel. Only the modules of the network itself
change, at the cut.

The producer, monitor, tests and `trainer.tuning` import `model`, `loading`, `errors`, `passes` and `unembedding`; the
rest of the trainer imports `precision` alone, so nothing is imported here: transformers would come with it.
"""
