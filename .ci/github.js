// GitHub's side of a delivery, by its own libraries: `node github.js SECRET` prints a JSON line for
// each example payload, as JSON and as a form: {event, form, body, signature}.

import { createRequire } from "node:module";
import { sign } from "@octokit/webhooks-methods";

const events = createRequire(import.meta.url)("@octokit/webhooks-examples");
const secret = process.argv[2];
for (const { name, examples } of events) {
  for (const example of examples) {
    const json = JSON.stringify(example);
    const form = new URLSearchParams({ payload: json }).toString();
    for (const body of [json, form]) {
      console.log(JSON.stringify({
        event: name, form: body === form, body, signature: await sign(secret, body),
      }));
    }
  }
}
