"""A plug-in for vLLM that serves each request its own intervention; docs/serving.md shows how to use it.

vLLM finds it by its entry points. Unless `ACTSCALE_INTERVENTIONS` is set, nothing in vLLM is changed. If it is set:

1. `configuration` adds what the plug-in serves to vLLM's configuration, which is part of its compilation key.
2. `admission` runs in the process that takes requests. It resolves the names in a request to numbers, attaches these to
   the request as a `plan`, and salts the prefix cache with them. `dropped_arguments` and `misplaced_options` refuse
   HTTP requests with options that vLLM would lose before that. All errors of a request occur in these three.
3. `worker` puts the table of parameters on the attention layers and projections that `sites` finds and checks.
4. `runner_v1` and `runner_v2` tell the table before each forward pass which tokens belong to which request.

Workers know neither names nor files, so interventions can be added, replaced and removed while requests run.
"""
