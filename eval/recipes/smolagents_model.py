"""smolagents: a local model of an agent; TransformersModel passes its extra arguments to generate.

pip install smolagents; python eval/recipes/smolagents_model.py
"""

from smolagents import TransformersModel

import hf_kvquant

folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
model = TransformersModel(folder, device_map="cpu", max_new_tokens=8, cache_implementation="kvquant-int8")
# A chat model brings its template; the bundled model is none.
model.tokenizer.chat_template = "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
answer = model.generate([{"role": "user", "content": [{"type": "text", "text": "Read all lines of a file."}]}])
print(answer.content, answer.token_usage)
