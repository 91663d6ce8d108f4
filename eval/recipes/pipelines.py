"""pipeline(): one text, a batch of texts, and a chat.

python eval/recipes/pipelines.py
"""

from transformers import pipeline

import hf_kvquant

write = pipeline("text-generation", hf_kvquant.__path__[0] + "/models/stdlib-nano")
options = {"max_new_tokens": 8, "cache_implementation": "kvquant-int4"}

one = write("def read_lines(path):\n", **options)
print(one)

# Texts of different lengths are padded on the left; padding does not influence the quantized tokens.
batch = write(["def read_lines(path):\n", "import os\n\n\nclass Path:\n    def"], batch_size=2, **options)
print(batch)

# A chat model brings its template; the bundled model is none.
write.tokenizer.chat_template = "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
chat = write([{"role": "user", "content": "Read all lines of a file."}], **options)
print(chat)
