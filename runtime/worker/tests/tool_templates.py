"""Renders chats with tools as Hugging Face transformers does: JSON on stdin, a list of {template, messages, tools};
the texts as a JSON list on stdout."""

import json
import sys

from transformers.utils.chat_template_utils import render_jinja_template

texts = []
for asked in json.load(sys.stdin):
    rendered, _ = render_jinja_template(
        conversations=[asked["messages"]],
        tools=asked["tools"] or None,
        chat_template=asked["template"],
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        date_string="26 Jul 2024",
    )
    texts.append(rendered[0])
json.dump(texts, sys.stdout)
