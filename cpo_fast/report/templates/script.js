for (const button of document.querySelectorAll("button.copy")) {
  const box = button.closest(".csv"), text = box.querySelector("pre"), status = box.querySelector("[role=status]");
  button.hidden = false;
  button.addEventListener("click", async () => {
    let copied = false;
    try {
      await navigator.clipboard.writeText(text.textContent);
      copied = true;
    } catch {
      box.querySelector("details").open = true;
      getSelection().selectAllChildren(text);
      copied = document.execCommand("copy");
    }
    status.textContent = copied ? "Copied" : "Selected; copy with the keyboard";
  });
}
