"""A vLLM engine on piecework: `plugin` puts it in the place of vLLM's compiler, `backend` compiles a graph, `kept` is what vLLM's AOT compile saves. Nothing else imports vLLM."""
