"""The files of a model's folder that say something about its pooling, together."""

from dataclasses import dataclass

from .decisions import Certainty
from .files import Document, Folder, Module, inside

# The names that sentence-transformers gave the Transformer module's own file; it takes the first that says anything.
_SENTENCE = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
PYLATE_DENSE = "pylate.models.Dense.Dense"  # PyLate's class for projections, sentence-transformers' Dense but by name


@dataclass(frozen=True)
class Sources:
    """Each is empty where it is missing, but for modules.json, which is None then."""

    folder: Folder
    modules: list[Module] | None
    home: str  # the folder of what makes the token states, inside the model's
    transformer: Document  # config.json there; what an adapter says about its base model, where that is elsewhere
    tokenizer: Document
    sentence: Document  # sentence-transformers' about its Transformer
    adapter: Document
    model: Document  # config_sentence_transformers.json

    @staticmethod
    def read(folder: Folder) -> "Sources":
        """
        Raises:
            FileNotFoundError: there is no model.
            ValueError: a file is malformed, and which.
        """
        modules = folder.modules()
        home = modules[0].path if modules else ""
        here = [folder.optional(inside(home, name)) for name in _SENTENCE]
        transformer = folder.optional(inside(home, "config.json"))
        adapter = folder.optional(inside(home, "adapter_config.json"))
        if modules is None and not (folder.has("config.json") or adapter.values):
            raise FileNotFoundError(f"{folder.root} is no model's folder: modules.json and config.json are missing")
        return Sources(
            folder=folder,
            modules=modules,
            home=home,
            transformer=transformer if transformer.values or not adapter.values else _base(adapter),
            tokenizer=folder.optional(inside(home, "tokenizer_config.json")),
            sentence=next((one for one in here if one.values), here[0]),
            adapter=adapter,
            model=folder.optional("config_sentence_transformers.json"),
        )

    @property
    def model_type(self) -> str | None:
        """sentence-transformers' class of models that the folder says it is for."""
        said = self.model.get("model_type", str)
        return "MultiVectorEncoder" if said == "ColBERT" else said  # PyLate's name for it

    @property
    def of_pylate(self) -> bool:
        """Its modules are as PyLate writes them, who names none for what it does behind them."""
        types = {module.type for module in self.modules or []}
        if {"Pooling", "MultiVectorMask"} & {module.name for module in self.modules or []}:
            return False
        return PYLATE_DENSE in types or bool(types and self.model.get("model_type", str) == "ColBERT")

    @property
    def family(self) -> str:
        """sentence-transformers' class for models of such modules."""
        names = {module.name for module in self.modules or []}
        if "SpladePooling" in names:
            return "SparseEncoder"
        return "MultiVectorEncoder" if self.of_pylate or "MultiVectorMask" in names else "SentenceTransformer"

    @property
    def certainty(self) -> Certainty:
        """Of what modules say, whose folders may be all that is left of them."""
        return "implied" if self.modules is None else "stated"

    @property
    def gives_layers(self) -> bool:
        """Whether the Transformer module is told to give the states of all layers."""
        key = "output_hidden_states"
        said = [self.sentence.get(one, dict) or {} for one in ("config_kwargs", "config_args")]
        return any(one.get(key) is True for one in (self.transformer.values, *said))

    @property
    def base_is_elsewhere(self) -> bool:
        """It is an adapter of a model whose config.json is not in this folder."""
        return bool(self.adapter.values) and self.transformer.name.startswith(self.adapter.name)


def _base(adapter: Document) -> Document:
    """A config.json of the base model, of what its adapter says: the class, and transformers' module that holds it."""
    said = Document(f"{adapter.name}: auto_mapping", adapter.get("auto_mapping", dict) or {})
    values: dict[str, object] = {}
    name, library = said.get("base_model_class", str), said.get("parent_library", str)
    if name is not None:
        values["architectures"] = [name]
    if library is not None and library.startswith("transformers.models."):
        values["model_type"] = library.split(".")[2]
    return Document(said.name, values)
